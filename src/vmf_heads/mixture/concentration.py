"""The concentration whose mean resultant length is given: the inverse of A_p, and what a fit of kappa comes down to."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import at_least
from .._expansion import complement as complement_of
from .._expansion import curvature
from .._expansion import mean_resultant as resultant_of

__all__ = ["vmf_concentration"]

# Below this 1 - R the start of the iteration is exact to rounding: its relative error is about (1 - R) / (p - 1).
_SETTLED = 2.0**-55


def vmf_concentration(mean_resultant: Tensor, p: int, *, complement: bool = False) -> Tensor:
    """The kappa with A_p(kappa) = `mean_resultant`, exact to rounding: the inverse of `vmf_mean_resultant`.

    For unit vectors y_1, ..., y_n it is the maximum-likelihood estimate of kappa from their mean resultant length
    ||y_1 + ... + y_n|| / n, where SciPy's estimate is accurate equal to::

        scipy.stats.vonmises_fisher.fit(y)[1]

    Args:
        mean_resultant: R in [0, 1], any shape, floating; or 1 - R, see `complement`.
        p: dimension of the space the sphere lies in, an integer >= 2.
        complement: the argument is 1 - R. Near R = 1 that is what determines kappa, about (p - 1) / (2 (1 - R)), and
            no R in floating point says it well.

    Returns:
        A tensor of the shape and dtype of `mean_resultant`. R = 0 gives 0 and R = 1 gives inf, both exactly; outside of
        [0, 1] and for NaN it is NaN, so clamp an R that rounding has moved above 1. What exceeds the dtype is inf.
        Computed in float64 and rounded once, on devices that have float64.

    Differentiable, in backward and forward mode, under vmap and torch.func, and inside torch.compile: the derivative
    with respect to R is 1 / A_p'(kappa), by the implicit function theorem; it is inf at R = 1. A second derivative is
    right but loses digits. Third derivatives are wrong.

    Raises:
        TypeError: `mean_resultant` is not a floating tensor, or `p` is not an integer.
        ValueError: `p` < 2.

    Accuracy: within 4 eps of the exact kappa of the argument *as given*, for p from 2 to 1 000 000 and every R from
    1e-38 to 1 - 1e-38, wherever kappa is a normal number of the dtype. (Largest error in float64 2.2 eps, in float32
    0.5; `python -m benchmarks concentration` makes the table in docs/mixture.md.) An error of the argument counts
    besides: a relative error e of R moves kappa by e A / (kappa A'), a factor of 1 at R = 0, (1 + R^2) / (1 - R^2) for
    large p, and 2 kappa / (p - 1) near R = 1. With `complement` the factor is (1 - A) / (kappa A'), which is 1 there.

    Method: Newton's iteration from Banerjee's estimate [1, Eq. 4.4]. The residual is taken as R - A for R < 1/2 and as
    (1 - A) - (1 - R) above: 1 - R is exact there, and 1 - A is computed without that subtraction (see `_expansion`).

    References: [1] Banerjee, Dhillon, Ghosh, Sra, "Clustering on the unit hypersphere using von Mises-Fisher
    distributions", JMLR 6, 2005. [2] Sra, "A short note on parameter approximation for von Mises-Fisher
    distributions", Computational Statistics 27, 2012, takes two such steps.

    >>> import torch
    >>> from vmf_heads.mixture import vmf_concentration
    >>> vmf_concentration(torch.tensor([0.0, 0.3130353, 0.9, 1.0]), p=3)  # coth(kappa) - 1/kappa
    tensor([ 0.0000,  1.0000, 10.0000,     inf])
    >>> vmf_concentration(torch.tensor(1e-12), p=256, complement=True)
    tensor(1.2750e+14)
    """
    if not isinstance(mean_resultant, Tensor) or not mean_resultant.is_floating_point():
        got = mean_resultant.dtype if isinstance(mean_resultant, Tensor) else type(mean_resultant).__name__
        raise TypeError(f"`mean_resultant` (of {got}) must be a floating tensor")
    p = at_least("p", p, 2)
    x = mean_resultant.double()
    point = x.detach()
    kappa = _solve(1 - point, point, p) if complement else _solve(point, 1 - point, p)
    # Everything that autograd or a torch.func transform can differentiate: a Taylor polynomial in h (= 0) around the
    # point, written as a midpoint rule, so that it has the second derivative, too.
    finite = kappa < torch.inf
    at = torch.where(finite, kappa, 1)
    h = point - x if complement else x - point
    value = at + h / curvature(at + h / (2 * curvature(at, p)), p)
    # kappa is infinite, and so is its derivative, where 1 - R is 0 or too small for its reciprocal.
    rest = torch.where(finite, 1, x if complement else 1 - x)
    value = torch.where(finite, value, (p - 1) / (2 * rest))
    return torch.where((point >= 0) & (point <= 1), value, torch.nan).to(mean_resultant.dtype)


def _solve(resultant: Tensor, rest: Tensor, p: int) -> Tensor:
    """kappa of R and 1 - R in float64, of which the smaller is exact."""
    kappa = resultant * (p - resultant * resultant) / (rest * (1 + resultant))
    # The start is off by 6.5 % at most, at p = 2, and by 0.17 / p for large p; each step squares that.
    for _ in range(4 if p < 12 else 3):
        below = resultant - resultant_of(kappa, p)
        above = complement_of(kappa, p) - rest
        step = torch.where(resultant < 0.5, below, above) / curvature(kappa, p)
        kappa = torch.where(rest > _SETTLED, kappa + step, kappa)
    return kappa
