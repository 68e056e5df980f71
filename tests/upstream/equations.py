"""Eq. 6, 7 and 9 in float64 with SciPy's Bessel functions, differentiable: what the repositories must compute."""

from collections.abc import Sequence
from typing import Any

import scipy.special
import torch
from torch import Tensor, nn
from torch.autograd import Function

import vmf_reference


class _LogNormalizer(Function):
    """log C_p(kappa), whose derivative is -I_{p/2}(kappa) / I_{p/2-1}(kappa)."""

    @staticmethod
    def forward(ctx: Any, kappa: Tensor, p: int) -> Tensor:
        ratio = scipy.special.ive(p / 2, kappa.numpy()) / scipy.special.ive(p / 2 - 1, kappa.numpy())
        ctx.save_for_backward(torch.as_tensor(ratio))
        return vmf_reference.log_normalizer(kappa, p)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return -grad * ctx.saved_tensors[0], None


def prototypes(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """(w (K, p), ||w|| (K,)) of a weight-normalised layer, or of a linear one."""
    if not hasattr(layer, "weight_g"):
        return layer.weight, layer.weight.norm(dim=1)
    w = layer.weight_g * layer.weight_v / layer.weight_v.norm(dim=1, keepdim=True)
    return w, w.norm(dim=1)


def log_student(features: Tensor, layer: nn.Module, temperature: float) -> Tensor:
    """Eq. 6: log P_s (..., K) of unit features (..., p)."""
    w, norms = prototypes(layer)
    bias = _LogNormalizer.apply(norms / temperature, w.shape[1])
    return (features @ w.T / temperature + bias).log_softmax(dim=-1)


def teacher(
    features: Tensor, layer: nn.Module, temperature: float, center: Tensor, *, of_normalizer: float | None = None
) -> Tensor:
    """Eq. 7: P_t (..., K). `of_normalizer`: the temperature that log C_p is left at by a head that nobody told."""
    w, norms = prototypes(layer)
    tau = temperature if of_normalizer is None else of_normalizer
    # Such a head returns <w, y> + tau log C_p(||w|| / tau), which the loss divides by its own temperature.
    bias = _LogNormalizer.apply(norms / tau, w.shape[1]) * tau / temperature
    return (features @ w.T / temperature + bias - center).softmax(dim=-1).detach()


def next_center(features: Tensor, layer: nn.Module, temperature: float, center: Tensor) -> Tensor:
    """Eq. 9 of responsibilities with momentum 0.9, over all leading dimensions of the features."""
    w, norms = prototypes(layer)
    log_c = vmf_reference.log_normalizer((norms / temperature).detach(), w.shape[1])
    scores = (features.flatten(0, -2) @ w.T).detach()
    return vmf_reference.next_center(center, scores, temperature, 0.9, log_c=log_c)


def pairs_of_views(targets: Sequence[Tensor], log_predictions: Sequence[Tensor]) -> Tensor:
    """DINO's mean cross-entropy over pairs of different views, (B, K) each."""
    terms = [
        -(target * log_p).sum(dim=1).mean()
        for u, target in enumerate(targets)
        for v, log_p in enumerate(log_predictions)
        if u != v
    ]
    return torch.stack(terms).mean()
