"""Eq. 5 to 9 of the paper, in float64 with SciPy's Bessel function: what the library must equal."""

import math

import scipy.special
import torch
from torch import Tensor


def log_normalizer(kappa: Tensor, p: int) -> Tensor:
    """log C_p(kappa), Eq. 5 without its approximation."""
    order = p / 2 - 1
    bessel = torch.as_tensor(scipy.special.ive(order, kappa.numpy()))
    assert (bessel > 1e-290).all(), "SciPy underflows here and is no reference"
    return order * kappa.log() - p / 2 * math.log(2 * math.pi) - (bessel.log() + kappa)


def with_gradient(norms: Tensor, p: int, temperature: float) -> Tensor:
    """log C_p(norms / temperature) whose gradient is that of Eq. 5: -A_p(kappa) / temperature, a ratio of Bessels."""
    kappa = (norms / temperature).detach()
    ratio = torch.as_tensor(scipy.special.ive(p / 2, kappa.numpy()) / scipy.special.ive(p / 2 - 1, kappa.numpy()))
    return log_normalizer(kappa, p) - ratio * (norms - norms.detach()) / temperature


def log_student(scores: Tensor, norms: Tensor, p: int, temperature: float) -> Tensor:
    """Eq. 6: log P_s (B, K) of raw scores <w_k, y_b>."""
    return (scores / temperature + log_normalizer(norms / temperature, p)).log_softmax(dim=1)


def teacher(scores: Tensor, norms: Tensor, p: int, temperature: float, center: Tensor) -> Tensor:
    """Eq. 7: P_t (B, K)."""
    return (scores / temperature + log_normalizer(norms / temperature, p) - center).softmax(dim=1)


def next_center(
    center: Tensor, scores: Tensor, temperature: float, momentum: float, *, log_c: Tensor | float = 0.0
) -> Tensor:
    """Eq. 9, row by row: as it is printed, or of responsibilities, with log C_p (K,) of the prototypes as `log_c`."""
    mean = torch.zeros_like(center)
    for row in scores:
        mean += (row / temperature + log_c).softmax(dim=0) / len(scores)
    return momentum * center + (1 - momentum) * mean.log()
