"""Samples of von Mises-Fisher distributions by rejection, all at once.

[1] Wood, "Simulation of the von Mises Fisher distribution", Communications in Statistics 23, 1994, algorithm VM*.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def sample_vmf(directions: Tensor, kappa: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One unit vector (n, p) of each distribution with direction (n, p) and kappa (n,), in float64 on the CPU."""
    directions, kappa = directions.double().cpu(), kappa.double().cpu()
    p = directions.shape[1]
    rest = _sample_rest(kappa, p, generator)  # 1 - <mu, y>, which has digits left where <mu, y> rounds to 1
    tangent = torch.randn(directions.shape, dtype=torch.float64, generator=generator)
    tangent -= (tangent * directions).sum(1, keepdim=True) * directions
    sine = (rest * (2 - rest)).sqrt()
    return F.normalize((1 - rest)[:, None] * directions + sine[:, None] * F.normalize(tangent, dim=1), dim=1)


def _sample_rest(kappa: Tensor, p: int, generator: torch.Generator | None) -> Tensor:
    """1 - <mu, y> of one draw for each kappa (n,).

    [1] proposes W = (1 - (1+b) Z) / (1 - (1-b) Z) with Z from Beta((p-1)/2, (p-1)/2), and accepts it with probability
    exp(kappa (W - x) + (p-1) log((1 - x W) / (1 - x^2))), where x = (1-b) / (1+b) is the mode. All of it is written
    here in 1 - W and 1 - x, so that nothing cancels for large kappa. About two thirds or more are accepted.
    """
    result = torch.empty_like(kappa)
    pending = torch.arange(len(kappa))
    while len(pending):
        k = kappa[pending]
        b = (p - 1) / (2 * k + torch.sqrt(4 * k * k + (p - 1) ** 2))
        rest_of_mode = 2 * b / (1 + b)
        mode = (1 - b) / (1 + b)
        # A beta variable is a share of two gamma variables.
        shape = torch.full_like(k, (p - 1) / 2)
        one, other = (torch._standard_gamma(shape, generator=generator) for _ in range(2))
        z = one / (one + other)
        rest = 2 * b * z / (1 - (1 - b) * z)
        log_ratio = torch.log((1 + mode * rest / rest_of_mode) / (1 + mode))
        log_accept = k * (rest_of_mode - rest) + (p - 1) * log_ratio
        accepted = torch.rand(len(k), dtype=torch.float64, generator=generator).log() < log_accept
        result[pending[accepted]] = rest[accepted]
        pending = pending[~accepted]
    return result
