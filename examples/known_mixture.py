"""WIP."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from vmf_heads import log_vmf_normalizer, vmf_mean_resultant


def sample_vmf(means: Tensor, kappa: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` points (C, count, p) of each component with mean direction `means` (C, p) and `kappa` (C,)."""
    p = means.shape[1]
    # The cosine t to the mean has density exp(kappa t) (1 - t^2)^((p-3)/2) with respect to the angle's cosine; in the
    # angle itself, t = cos(a), it is exp(kappa cos a) sin(a)^(p-2), which is 0 at both ends: sampled by its inverse.
    angles = torch.linspace(0, math.pi, 20001, dtype=torch.float64)[1:-1]
    log_density = kappa.double()[:, None] * angles.cos() + (p - 2) * angles.sin().log()
    cumulative = (log_density - log_density.amax(1, keepdim=True)).exp().cumsum(1)
    uniform = torch.rand(len(means), count, dtype=torch.float64, generator=generator) * cumulative[:, -1:]
    angle = angles[torch.searchsorted(cumulative, uniform).clamp(max=len(angles) - 1)]
    tangent = torch.randn(len(means), count, p, dtype=torch.float64, generator=generator)
    mean = means.double()[:, None]
    tangent = F.normalize(tangent - (tangent * mean).sum(-1, keepdim=True) * mean, dim=-1)
    return (angle.cos()[..., None] * mean + angle.sin()[..., None] * tangent).float()


def concentration(resultant: Tensor, p: int) -> Tensor:
    """The kappa whose mean resultant length A_p(kappa) is `resultant`: Newton's method from Banerjee's estimate."""
    r = resultant.double().clamp(1e-6, 1 - 1e-6)
    kappa = r * (p - r**2) / (1 - r**2)
    for _ in range(4):
        a = vmf_mean_resultant(kappa, p)
        kappa = (kappa - (a - r) / (1 - a**2 - (p - 1) * a / kappa)).clamp(min=1e-6)
    return kappa.to(resultant.dtype)
