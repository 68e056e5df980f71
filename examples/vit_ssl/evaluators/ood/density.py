"""Densities as scores: of the mixture that a head is, and of one fitted to the backbone's features."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from evaluators.prototypes.components import Components
from runtime.distributed import device, group_of_one
from vmf_heads import log_vmf_normalizer
from vmf_heads.mixture import VMFMixture, density_scores, fit_vmf_mixture

Scores = dict[str, np.ndarray]

COUNTS = (1, 2, 4, 8, 16, 32, 64, 128)
"""These numbers of components are tried, as long as each has ten images on average."""
MAX_ITERATIONS = 50
ROWS = 4096
"""So many images are projected at a time."""


class OwnMixture(NamedTuple):
    """The mixture of a trained head."""

    mixture: VMFMixture
    project: Callable[[Tensor], Tensor]
    """Backbone features (N, D) -> unit vectors (N, p)."""


@torch.no_grad()
def own_mixture(components: Components) -> OwnMixture:
    """Return the mixture whose responsibilities are the softmax of the components' logits.

    With log C_p in the logits its weights are equal, by Eq. 6. Without, as in plain DINO, they are proportional to
    1 / C_p(kappa).
    """
    kappa = components.prototypes.norm(dim=1).double() / components.temperature
    log_weight = components.log_normalizer.double() - log_vmf_normalizer(kappa, components.prototypes.shape[1])
    return OwnMixture(VMFMixture(log_weight.softmax(0), components.prototypes, kappa), components.project)


@torch.inference_mode()
def own_scores(own: OwnMixture, x: np.ndarray) -> Scores:
    """Return log-density, kappa of the most probable component and its probability, of backbone features (N, D)."""
    y = torch.cat([own.project(unprepared(x[first : first + ROWS])) for first in range(0, len(x), ROWS)])
    found = density_scores(own.mixture, y)
    return {
        "head_density": as_scores(found.log_prob),
        "head_kappa": as_scores(found.kappa),
        "head_responsibility": as_scores(found.responsibility),
    }


def fit_mixture(
    x: np.ndarray, held_out: np.ndarray, num_components: int | None = None
) -> tuple[VMFMixture, dict[str, Any]]:
    """Return a mixture fitted to the directions of backbone features (N, D), and how it was chosen.

    The number of components is `num_components`, or the one of COUNTS whose fit to the other rows gives those of the
    mask `held_out` (N,) the highest density; the sweep goes upwards and ends when two in a row are worse than the best.
    What is returned is fitted to all rows. Call it on all ranks, each of which then has the same mixture.
    """
    fit = partial(_fit, group=group_of_one())  # every rank has all rows, and finds what one process finds
    y, held = directions(x), torch.from_numpy(held_out).to(device())
    if num_components is not None:
        return fit(y, num_components), {"components": num_components}
    rest, fresh = y[~held], y[held]
    sweep: dict[int, float] = {}
    for count in COUNTS:
        if sweep and (count * 10 > len(rest) or max(list(sweep.values())[-2:]) < max(sweep.values())):
            break
        sweep[count] = fit(rest, count).log_prob(fresh).mean().item()
    best = max(sweep, key=sweep.__getitem__)
    return fit(y, best), {"components": best, "held_out_by_components": {str(k): v for k, v in sweep.items()}}


def mixture_scores(mixture: VMFMixture, x: np.ndarray) -> Scores:
    """Return log-density and kappa of the most probable component of backbone features (N, D)."""
    found = density_scores(mixture, directions(x))
    return {"mixture_density": as_scores(found.log_prob), "mixture_kappa": as_scores(found.kappa)}


def directions(x: np.ndarray) -> Tensor:
    """Return features (N, D) as unit vectors in float32 on the device."""
    return F.normalize(unprepared(x), dim=1)


def unprepared(x: np.ndarray) -> Tensor:
    """Return features (N, D) in float32 on the device; a copy, because they may be memory-mapped."""
    return torch.from_numpy(np.array(x)).to(device()).float()


def as_scores(values: Tensor) -> np.ndarray:
    """Return a score (N,) in float64 on the CPU."""
    return values.double().cpu().numpy()


def _fit(y: Tensor, count: int, *, group: dist.ProcessGroup | None) -> VMFMixture:
    return fit_vmf_mixture(y, count, max_iterations=MAX_ITERATIONS, process_group=group).mixture
