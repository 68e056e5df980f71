"""The normalising constant of the von Mises-Fisher distribution and its derivatives.

The density of a component on the unit sphere of R^p with mean direction mu and concentration kappa is

    f(y) = C_p(kappa) exp(kappa <mu, y>),    C_p(kappa) = kappa^(p/2-1) / ((2 pi)^(p/2) I_{p/2-1}(kappa))

This module holds the public functions, their checks and their derivatives; the arithmetic is in `_expansion`.

References
----------
[1] NIST Digital Library of Mathematical Functions, https://dlmf.nist.gov, chapter 10.
[2] Govindarajan et al., "DINO as a von Mises-Fisher mixture model", ICLR 2023, section 3.3 and appendix A.2.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ._checks import at_least
from ._compiled import evaluate
from ._expansion import curvature, mean_resultant, relative_log_normalizer
from ._lowering import in_one
from ._matmul import has_autocast

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

__all__ = ["log_vmf_normalizer", "vmf_mean_resultant"]


def log_vmf_normalizer(kappa: Tensor, p: int, *, relative: bool = False, compiled: bool | None = None) -> Tensor:
    """The logarithm of the normalising constant of a von Mises-Fisher distribution, exact to rounding.

    Equals, where SciPy neither under- nor overflows (at p = 256 in float32 it does for all kappa <= 50)::

        nu = p / 2 - 1
        nu * log(kappa) - p / 2 * log(2 * pi) - (log(scipy.special.ive(nu, kappa)) + kappa)

    Args:
        kappa: concentrations >= 0, any shape, floating. In a prototype head kappa = ||w|| / temperature.
        p: dimension of the space the sphere lies in (not of the sphere), an integer >= 2.
        relative: return log C_p(kappa) - log C_p(0) instead. It differs by a constant, which no softmax sees, and is
            computed directly: at p = 256 the constant is 344 nats, too much for bfloat16 to carry beside what matters.
        compiled: None compiles one kernel on CUDA and uses plain operations elsewhere; True compiles on every device
            and raises where that is impossible; False never compiles. Inside torch.compile this changes nothing.

    Returns:
        A tensor of the shape of `kappa`. float32 and float64 keep their dtype; float16 and bfloat16 are computed in
        float32 and rounded once; under autocast they stay float32. kappa = 0 is exact, +inf gives -inf, negative or
        NaN gives NaN.

    Differentiable twice, in backward and forward mode, under vmap and torch.func, and inside torch.compile:
    the first derivative is -A_p(kappa) of `vmf_mean_resultant`, the second -A_p'(kappa). Third derivatives are wrong.

    Raises:
        TypeError: `kappa` is not a floating tensor, or `p` is not an integer.
        ValueError: `p` < 2.
        RuntimeError: `compiled=True` where torch.compile does not work.

    Accuracy, largest and root-mean-square relative error in eps of value, first and second derivative, for p from 2 to
    1 000 000 and kappa from 0 to 1e9 (`python -m benchmarks normalizer` makes these lines)::

        float32   D 2.7 / 0.7   A 1.8 / 0.4   A' 3.5 / 0.5   not finite: 0 of 3222
        float64   D 2.6 / 0.7   A 1.5 / 0.4   A' 4.6 / 0.6   not finite: 0 of 3222

    The derivatives: with F = 0F1(; p/2; kappa^2/4), C_p(kappa)/C_p(0) = 1/F and F' = kappa/p 0F1(; p/2+1; kappa^2/4),
    so d/dkappa log C_p = -F'/F = -I_{p/2}/I_{p/2-1} = -A_p (DLMF 10.29.4, 10.39.9), and A_p' follows from the
    recurrence in the order, DLMF 10.29.1, differentiated (see `_expansion`).

    Reference: [2] Eq. 5 takes the first term of DLMF 10.41.3 (https://dlmf.nist.gov/10.41.E3); here as many terms are
    summed as the dtype resolves, rearranged so that nothing cancels. Accuracy, method and proofs by test:
    docs/numerics.md.

    >>> import torch
    >>> from vmf_heads import log_vmf_normalizer
    >>> log_vmf_normalizer(torch.tensor([0.0, 10.0, 100.0]), p=256)
    tensor([344.3349, 344.1397, 326.0487])
    >>> kappa = torch.tensor(10.0, requires_grad=True)
    >>> log_vmf_normalizer(kappa, p=256, relative=True).backward()
    >>> kappa.grad  # -I_128(10) / I_127(10)
    tensor(-0.0390)
    """
    x, p = _prepare(kappa, p)
    if _is_transformed():
        point, h = _split(x)
        a, slope = in_one(mean_resultant, point, p), in_one(curvature, point, p)
        value = in_one(relative_log_normalizer, point, p) - h * a - h * h / 2 * slope
    else:
        value = _RelativeLogNormalizer.apply(x, p, compiled)
    if not relative:
        value = value + _log_normalizer_at_zero(p)
    return _restore(value, kappa)


def vmf_mean_resultant(kappa: Tensor, p: int, *, compiled: bool | None = None) -> Tensor:
    """The mean resultant length A_p(kappa) = I_{p/2}(kappa) / I_{p/2-1}(kappa), exact to rounding.

    It is the expectation of <mu, y> under the component, and minus the derivative of `log_vmf_normalizer`.

    Args:
        kappa: concentrations >= 0, any shape, floating.
        p: dimension of the space the sphere lies in, an integer >= 2.
        compiled: as in `log_vmf_normalizer`.

    Returns:
        A tensor of the shape of `kappa` with values in [0, 1], dtypes as in `log_vmf_normalizer`; 0 at 0, 1 at +inf,
        NaN for negative or NaN. Differentiable once to full accuracy; its derivative is the variance of <mu, y>.

    Raises:
        TypeError: `kappa` is not a floating tensor, or `p` is not an integer.
        ValueError: `p` < 2.
        RuntimeError: `compiled=True` where torch.compile does not work.

    Reference: [2] section 3.3; DLMF 10.29.1 for the recurrence between orders, docs/numerics.md for the method.

    >>> import torch
    >>> from vmf_heads import vmf_mean_resultant
    >>> vmf_mean_resultant(torch.tensor([0.0, 1.0, 10.0]), p=3)  # coth(kappa) - 1/kappa
    tensor([0.0000, 0.3130, 0.9000])
    """
    x, p = _prepare(kappa, p)
    if _is_transformed():
        point, h = _split(x)
        value = in_one(mean_resultant, point, p) + h * in_one(curvature, point, p)
    else:
        value = _MeanResultant.apply(x, p, compiled)
    return _restore(value, kappa)


class _RelativeLogNormalizer(Function):
    """D(kappa); D' = -A."""

    @staticmethod
    def forward(kappa: Tensor, p: int, compiled: bool | None) -> Tensor:
        return evaluate(relative_log_normalizer, kappa, p, compiled)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int, bool | None], output: Tensor) -> None:
        _save(ctx, inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return -grad * _MeanResultant.apply(ctx.saved_tensors[0], ctx.p, ctx.compiled), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return -tangent * _MeanResultant.apply(ctx.saved_tensors[0], ctx.p, ctx.compiled)


class _MeanResultant(Function):
    """A(kappa). Its derivative is evaluated by its own formula: differentiating the one for A loses all digits."""

    @staticmethod
    def forward(kappa: Tensor, p: int, compiled: bool | None) -> Tensor:
        return evaluate(mean_resultant, kappa, p, compiled)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int, bool | None], output: Tensor) -> None:
        _save(ctx, inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad * evaluate(curvature, ctx.saved_tensors[0], ctx.p, ctx.compiled), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return tangent * evaluate(curvature, ctx.saved_tensors[0], ctx.p, ctx.compiled)


def _save(ctx: Any, inputs: tuple[Tensor, int, bool | None]) -> None:
    kappa, ctx.p, ctx.compiled = inputs
    ctx.save_for_backward(kappa)
    ctx.save_for_forward(kappa)


def _is_transformed() -> bool:
    """Whether torch.compile, torch.export or a torch.func transform is at work: no place for an autograd.Function.

    Compile rejects a Function with a jvp, compile(func.grad) and export drop its backward, and jacfwd(jacfwd) silently
    gives 0 for its second derivative. There the Taylor polynomial around the detached point takes its place: it has
    the right value and, differentiated by any of them, the right first and second derivative.
    """
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    """(point, h) with x = point + h, where only h (= 0) carries gradients."""
    point = x.detach()
    return point, torch.where(point < torch.inf, x - point, 0)


def _log_normalizer_at_zero(p: int) -> float:
    """log C_p(0) = -log(area of the unit sphere) = log Gamma(p/2) - log 2 - (p/2) log pi."""
    return math.lgamma(p / 2) - math.log(2) - p / 2 * math.log(math.pi)


def _prepare(kappa: Tensor, p: int) -> tuple[Tensor, int]:
    got = kappa.dtype if isinstance(kappa, Tensor) else type(kappa).__name__
    if got not in _DTYPES:
        raise TypeError(f"`kappa` (of {got}) must be a tensor of float16, bfloat16, float32 or float64")
    p = at_least("p", p, 2)  # also makes it a constant, not a symbol, where torch.compile traces
    return (kappa.float() if kappa.dtype in (torch.float16, torch.bfloat16) else kappa), p


def _restore(value: Tensor, kappa: Tensor) -> Tensor:
    under_autocast = has_autocast(kappa.device) and torch.is_autocast_enabled(kappa.device.type)
    return value if under_autocast else value.to(kappa.dtype)
