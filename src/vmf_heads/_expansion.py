"""Uniform expansion of the von Mises-Fisher log-normaliser, its slope and its curvature.

Notation: nu = p/2 - 1 is the Bessel order, N = nu + m the order at which the expansion is summed, r = kappa/N,
q = sqrt(1 + r^2), t = 1/q, u = q - 1. D is the log-normaliser relative to kappa = 0, A = -dD/dkappa, B = 1 - A:

    D_N = -{ N (u - log1p(u/2)) - log1p(u)/2 + u t W(t) },      W = (G(t) - G(1)) / (1 - t),   G = sum_i V_i(t) / N^i
    A_N = r { 1/(1 + q) + t^2 H(t) },                           H = -1/(2N) - t G'(t)/N
    B_N = (1 + 1/(q + r)) / (1 + q) - r t^2 H(t)
    X'_N = t/(q + r) - r t^3 J(t),  X = kappa B,                J = 2 t H - (1 - t^2) H'

where sum_i V_i(t)/N^i is the logarithm of sum_i U_i(t)/N^i in DLMF 10.41.3. V_i(1) are the coefficients of Stirling's
series, so every gamma function of C_p cancels against G(1). Each line is a sum of terms that do not cancel, and
vanishes with its first factor exactly where the function does: kappa = 0 needs no special case.

From N down to nu D goes in strides of several orders. With F_v = 0F1(; v+1; z), z = kappa^2/4, D_v = -log F_v and
rho_v = F_{v+1}/F_v = 2(v+1) A_v / kappa, the recurrence F_v = F_{v+1} + z F_{v+2} / ((v+1)(v+2)) (DLMF 10.29.1)
composes to polynomials with positive coefficients, in which nothing cancels:

    F_v = (1 + z P(z)) F_{v+m} + z Q(z) F_{v+m+1},     D_v = D_{v+m} - log1p(z (P(z) + Q(z) rho_{v+m}))

A goes down order by order, by the same recurrence A_v = kappa / (2(v+1) + kappa A_{v+1}), written with B:

    y_v = 2(v+1) - X_{v+1},   A_v = kappa / (kappa + y_v),   B_v = y_v / (kappa + y_v)
    A'_v = (y_v + kappa X'_{v+1}) / (kappa + y_v)^2,         X'_v = B_v^2 - A_v^2 X'_{v+1}

y_v lies in [v + 1/2, 2v + 2], so it never cancels, and its errors reach A_v multiplied by B_v. Carrying A itself adds
one rounding of 1 per order; the derivative of the plain recurrence, and the Riccati equation A' = 1 - A^2 - (p-1)
A/kappa, both cancel. Here both terms of A' are positive.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

from ._debye import Polynomial, add, debye_log_polynomials, multiply

_Function = TypeVar("_Function", bound=Callable[..., object])

# (smallest order N, terms M) that keep the truncation below rounding; smaller orders are shifted up to the last N.
_TERMS = {
    torch.float64: ((127, 6), (63, 8), (31, 10), (20, 13), (16, 16)),
    torch.float32: ((255, 1), (63, 2), (31, 3), (9, 6), (7, 7)),
}
# Above this kappa, D = D(bound) - (kappa - bound) to rounding; below it no square and no product of factors overflows.
_KAPPA_BOUND = {torch.float64: 1e75, torch.float32: 1e18}
# Below this r, D is proportional to r^2 to rounding, and r^2 itself would leave the normal numbers before D does.
_SMALLEST_R = {torch.float64: 1e-9, torch.float32: 1e-4}
# The longest stride, in which powers of z up to half of it occur, and the bound on kappa that keeps those finite.
# It can be lower there: only orders below 16 (float64) or 7 (float32) are left by strides.
_LONGEST_STRIDE = {torch.float64: 16, torch.float32: 4}
_KAPPA_BOUND_OF_STRIDES = {torch.float64: 1e19, torch.float32: 1e9}
# For p <= 16 and kappa beyond the switch, errors of y at N would reach A' magnified by N/nu; the large-kappa series is
# exact to rounding there with so many terms.
_TAIL_HIGHEST_P = 16
_TAIL_SWITCH = {torch.float64: 28, torch.float32: 14}
_TAIL_TERMS = {torch.float64: 26, torch.float32: 21}
# The same for B in float64: (highest p, switch). For p <= 4 the steps down cost too much below the switch, too.
_COMPLEMENT_TAIL = ((16, 28), (33, 40))
_COMPLEMENT_TAIL_TERMS = 33
# So many points on half the circle integrate exp(kappa cos) to rounding for kappa <= 28.
_CIRCLE_POINTS = 28


def constant_in_graphs(function: _Function) -> _Function:
    """Mark `function`: torch.compile calls it while it traces, and its result becomes a constant of the graph.

    The mark is that of torch.compiler.assume_constant_result, which would import the whole compiler to set it: as much
    time as importing torch and this library takes without.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@dataclass(frozen=True)
class Stride:
    """Polynomials in z that lead from the orders v+m, v+m+1 down to v, v+1, by ascending powers.

    F_v = (1 + z P) F_{v+m} + z Q F_{v+m+1} and F_{v+1} = P_next F_{v+m} + Q_next F_{v+m+1}
    """

    P: tuple[float, ...]
    Q: tuple[float, ...]
    P_next: tuple[float, ...]
    Q_next: tuple[float, ...]


@dataclass(frozen=True)
class Expansion:
    """Constants of one (p, dtype); polynomials by ascending powers of t."""

    N: float
    strides: tuple[Stride, ...]  # from order N down to nu
    steps: tuple[float, ...]  # 2(v+1) for v = N-1, N-2, ..., nu
    W: tuple[float, ...]
    H: tuple[float, ...]
    J: tuple[float, ...]


@constant_in_graphs
def expansion(p: int, dtype: torch.dtype, fewest_steps: int = 0) -> Expansion:
    """The constants for dimension `p` in `dtype`; constants of the graph, too, where torch.compile traces through."""
    return _expand(p, dtype, fewest_steps)


@cache
def _expand(p: int, dtype: torch.dtype, fewest_steps: int) -> Expansion:
    """Exact rationals, each rounded once to a float."""
    nu = Fraction(p, 2) - 1
    table = _TERMS[dtype]
    smallest, terms = next((row for row in table if nu + fewest_steps >= row[0]), table[-1])
    shift = max(fewest_steps, math.ceil(smallest - nu))
    N = nu + shift

    G: Polynomial = [Fraction(0)] * (3 * terms + 1)
    for i, V in enumerate(debye_log_polynomials(terms), start=1):
        for power, coefficient in enumerate(V):
            G[power] += coefficient / N**i

    # (G(t) - G(1)) / (1 - t) by synthetic division: the coefficient of t^k is minus the sum of those above it.
    W = [-sum(G[k + 1 :], Fraction(0)) for k in range(len(G) - 1)]
    H = [-power * c / N for power, c in enumerate(G)]
    H[0] -= 1 / (2 * N)
    J = [Fraction(0)] * (len(H) + 1)
    for power, c in enumerate(H):
        J[power + 1] += (2 + power) * c
        if power:
            J[power - 1] -= power * c

    strides = tuple(
        _stride(N - start, min(_LONGEST_STRIDE[dtype], shift - start))
        for start in range(0, shift, _LONGEST_STRIDE[dtype])
    )
    steps = tuple(float(2 * (N - j)) for j in range(shift))
    return Expansion(float(N), strides, steps, *map(_floats, (W, H, J)))


def _stride(top: Fraction, orders: int) -> Stride:
    """From order `top` down by so many `orders`."""
    P, Q, P_next, Q_next = [Fraction(1)], [Fraction(0)], [Fraction(0)], [Fraction(1)]
    for j in range(1, orders + 1):
        v = top - j
        step = [Fraction(0), 1 / ((v + 1) * (v + 2))]
        P, P_next = add(P, multiply(step, P_next)), P
        Q, Q_next = add(Q, multiply(step, Q_next)), Q
    return Stride(_floats(P[1:]), _floats(Q[1:]), _floats(P_next), _floats(Q_next))


def _floats(polynomial: Polynomial) -> tuple[float, ...]:
    """Each coefficient rounded once."""
    return tuple(map(float, polynomial))


def relative_log_normalizer(kappa: Tensor, p: int) -> Tensor:
    """D(kappa) = log C_p(kappa) - log C_p(0); -inf at +inf, NaN below 0."""
    e = expansion(p, kappa.dtype)
    smallest = _SMALLEST_R[kappa.dtype] * e.N
    bound = (_KAPPA_BOUND_OF_STRIDES if e.strides else _KAPPA_BOUND)[kappa.dtype]
    bounded = kappa.clamp(min=smallest, max=bound)
    r, q, t = _coordinates(bounded, e)
    u = r * (r / (1 + q))  # q - 1 without the cancellation
    log_f = e.N * (u - torch.log1p(u / 2)) - torch.log1p(u) / 2 + (u * t) * horner(e.W, t)

    if e.strides:
        z = bounded * (bounded / 4)
        rho = 2 * (e.N + 1) / e.N * (1 / (1 + q) + t * t * horner(e.H, t))
        for number, stride in enumerate(e.strides, start=1):
            rise = z * (horner(stride.P, z) + horner(stride.Q, z) * rho)
            log_f = log_f + torch.log1p(rise)
            if number < len(e.strides):
                rho = (horner(stride.P_next, z) + horner(stride.Q_next, z) * rho) / (1 + rise)
    scale = (kappa / smallest).clamp(max=1)
    return _nan_below_zero(kappa, (kappa.clamp(max=bound) - kappa) - log_f * scale * scale)


def mean_resultant(kappa: Tensor, p: int) -> Tensor:
    """A(kappa) = I_{p/2}(kappa) / I_{p/2-1}(kappa) = -dD/dkappa, in [0, 1]; NaN below 0."""
    e = expansion(p, kappa.dtype)
    bounded = _bounded(kappa)
    r, q, t = _coordinates(bounded, e)
    H = horner(e.H, t)
    A = _slope(r, q, t, H)
    if e.steps:
        B = _complement(r, q, t, H)
        for step in e.steps:
            A, B, _ = _step_down(bounded, B, step)
    return _nan_below_zero(kappa, A.clamp(max=1))  # rounding may step over the supremum


def complement(kappa: Tensor, p: int) -> Tensor:
    """B(kappa) = 1 - A(kappa), in [0, 1], exact to rounding where A is near 1, too; float64; NaN below 0."""
    bounded = _bounded(kappa)
    switches = [switch for highest_p, switch in _COMPLEMENT_TAIL if p <= highest_p]  # torch 2.8 does not trace next()
    if p in (2, 4):
        B = _complement_on_circle(bounded, p)
    elif p == 3:
        B = _complement_on_sphere(bounded)
    else:
        B = _complement_by_steps(bounded, p)
    if switches:
        switch = switches[0]
        y = switch / bounded.clamp(min=switch)
        B = torch.where(bounded <= switch, B, horner(_complement_tail_coefficients(p, switch), y) * y)
    return _nan_below_zero(kappa, B)


def _complement_by_steps(kappa: Tensor, p: int) -> Tensor:
    e = expansion(p, kappa.dtype)
    r, q, t = _coordinates(kappa, e)
    B = _complement(r, q, t, horner(e.H, t))
    for step in e.steps:
        _, B, _ = _step_down(kappa, B, step)
    return B


def _complement_on_circle(kappa: Tensor, p: int) -> Tensor:
    """B for even p: the mean of 1 - cos(angle) by the trapezoidal rule, whose terms are positive.

    The density of the angle is proportional to sin(angle)^(p-2) exp(kappa cos(angle)).
    """
    half_angle = torch.linspace(0, math.pi / 2, _CIRCLE_POINTS + 1, dtype=kappa.dtype, device=kappa.device)
    rest = 2 * half_angle.sin().square()  # 1 - cos(angle)
    ends = torch.where((half_angle > 0) & (half_angle < math.pi / 2), 1.0, 0.5)
    density = ends * (2 * half_angle).sin() ** (p - 2) * torch.exp(-kappa.unsqueeze(-1) * rest)
    return (density * rest).sum(-1) / density.sum(-1)


def _complement_on_sphere(kappa: Tensor) -> Tensor:
    """B for p = 3, where A = coth(kappa) - 1/kappa; below 1 that cancels, and the steps do not."""
    safe = kappa.clamp(min=1)
    return torch.where(kappa < 1, _complement_by_steps(kappa, 3), (1 - 2 * safe / torch.expm1(2 * safe)) / safe)


def curvature(kappa: Tensor, p: int) -> Tensor:
    """A'(kappa) = dA/dkappa > 0, the variance of <mu, y> under the component; 1/p at 0, NaN below 0."""
    e = expansion(p, kappa.dtype, fewest_steps=1)
    bounded = _bounded(kappa)
    r, q, t = _coordinates(bounded, e)
    H = horner(e.H, t)
    B = _complement(r, q, t, H)
    dX = t / (q + r) - r * t * t * (t * horner(e.J, t))
    result = dX  # replaced below: at least one step is taken
    for step in e.steps:
        A, B, total = _step_down(bounded, B, step)
        result = (B + A * dX) / total
        dX = B * B - A * A * dX
    if p <= _TAIL_HIGHEST_P:
        switch = _TAIL_SWITCH[kappa.dtype]
        result = torch.where(bounded <= switch, result, _tail_curvature(bounded.clamp(min=switch), p))
    return _nan_below_zero(kappa, result)


def _bounded(kappa: Tensor) -> Tensor:
    return kappa.clamp(max=_KAPPA_BOUND[kappa.dtype])


def _coordinates(kappa: Tensor, e: Expansion) -> tuple[Tensor, Tensor, Tensor]:
    r = kappa / e.N
    q = torch.sqrt(1 + r * r)
    return r, q, 1 / q


def _slope(r: Tensor, q: Tensor, t: Tensor, H: Tensor) -> Tensor:
    return r * (1 / (1 + q) + t * t * H)


def _complement(r: Tensor, q: Tensor, t: Tensor, H: Tensor) -> Tensor:
    return (1 + 1 / (q + r)) / (1 + q) - r * t * (t * H)


def _step_down(kappa: Tensor, B: Tensor, step: float) -> tuple[Tensor, Tensor, Tensor]:
    """(A_v, B_v, kappa + y_v) from B_{v+1} and step = 2(v+1)."""
    y = step - kappa * B
    total = kappa + y
    # Not y / total: a compiler that inlines would double the expression with every step.
    return kappa / total, 1 / (1 + kappa / y), total


def _tail_curvature(kappa: Tensor, p: int) -> Tensor:
    """A' = -sum_j j c_j / kappa^{j+1}, where A ~ sum_j c_j / kappa^j."""
    coefficients = _tail_coefficients(p, kappa.dtype)
    y = _TAIL_SWITCH[kappa.dtype] / kappa
    return horner(coefficients, y) * y * y


@constant_in_graphs
def _tail_coefficients(p: int, dtype: torch.dtype) -> tuple[float, ...]:
    return _expand_tail(p, dtype)


@cache
def _expand_tail(p: int, dtype: torch.dtype) -> tuple[float, ...]:
    """-j c_j / switch^{j+1}, j >= 1."""
    c = _tail_series(p, _TAIL_TERMS[dtype])
    return tuple(float(-j * c[j] / Fraction(_TAIL_SWITCH[dtype]) ** (j + 1)) for j in range(1, len(c)))


@constant_in_graphs
def _complement_tail_coefficients(p: int, switch: int) -> tuple[float, ...]:
    return _expand_complement_tail(p, switch)


@cache
def _expand_complement_tail(p: int, switch: int) -> tuple[float, ...]:
    """-c_j / switch^j, j >= 1: B = 1 - A by powers of switch / kappa."""
    c = _tail_series(p, _COMPLEMENT_TAIL_TERMS)
    return tuple(float(-c[j] / Fraction(switch) ** j) for j in range(1, len(c)))


def _tail_series(p: int, terms: int) -> list[Fraction]:
    """c_0, ..., c_terms of A ~ sum_j c_j / kappa^j: the Riccati equation A' = 1 - A^2 - (p-1) A/kappa, term by term."""
    c = [Fraction(1), Fraction(1 - p, 2)]
    for j in range(2, terms + 1):
        products = sum((c[i] * c[j - i] for i in range(1, j)), Fraction(0))
        c.append(((j - p) * c[j - 1] - products) / 2)
    return c


def horner(coefficients: Sequence[float], x: Tensor) -> Tensor:
    """The polynomial with ascending `coefficients` at `x`, in the dtype of `x`; 0 without any."""
    result = torch.full_like(x, coefficients[-1] if coefficients else 0)
    for c in reversed(coefficients[:-1]):
        result = result * x + c
    return result


def _nan_below_zero(kappa: Tensor, value: Tensor) -> Tensor:
    return torch.where(kappa < 0, torch.nan, value)
