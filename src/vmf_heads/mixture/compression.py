"""Fewer components for nearly the same responsibilities: what nothing uses is left out, what overlaps is merged."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .._checks import positive
from .._memory import rows_per_chunk
from ..special import vmf_mean_resultant
from .concentration import vmf_concentration
from .distribution import VMFMixture, bhattacharyya_coefficient

__all__ = ["CompressedMixture", "compress_mixture"]

OVERLAPS = (0.9999, 0.999, 0.997, 0.99, 0.97, 0.95, 0.9, 0.8, 0.7, 0.5)
"""Bhattacharyya coefficients from which on components are merged; the lowest that keeps the promise is taken."""


@dataclass(frozen=True, eq=False)
class CompressedMixture:
    """What `compress_mixture` found."""

    mixture: VMFMixture  # of the components that are left
    component: Tensor  # (K,) int64: which of them took over each component of the old mixture; -1: none
    total_variation: float  # between old and new responsibilities, a mean over the features


@torch.no_grad()
def compress_mixture(mixture: VMFMixture, features: Tensor, total_variation: float = 0.01) -> CompressedMixture:
    """A mixture of fewer components whose responsibilities for `features` differ by less than `total_variation`.

    Components with the smallest mean responsibility are left out, as long as all of these together stay below half of
    `total_variation`. The others are merged where they overlap: the one with the larger mean responsibility leads, and
    those whose Bhattacharyya coefficient with it is large enough join it. A group becomes one component with the mean
    and the weight of all of it. With r the old and s the new responsibilities, what is kept below the bound is::

        mean over y of 1/2 (sum_g |sum_{k in g} r_k(y) - s_g(y)| + sum_{k left out} r_k(y))

    so that merging itself counts nothing, and a group that keeps its share of every row is no change.

    A trained head: `VMFMixture.from_head(teacher)`, with weights `softmax(-log_center)` for the targets of Eq. 7. The
    result goes to a head of as many prototypes by `to_head`, and its weights to the centre, `-mixture.weights.log()`;
    a head has none itself, and where all prototypes of a head are one group, its student loses their number.

    Args:
        mixture: what is compressed.
        features: y (N, p), unit vectors that stand for those the mixture is for. Memory beyond them is a few times
            (K, p); time grows with K times the number of groups, and with N K.
        total_variation: the bound, between 0 and 1.

    Returns:
        A `CompressedMixture`, with the total variation that was measured.

    Raises:
        ValueError, TypeError: an argument is out of its range; the message names it.

    >>> import torch
    >>> from vmf_heads.mixture import VMFMixture, compress_mixture
    >>> directions = torch.eye(8).repeat_interleave(3, dim=0) + 0.01 * torch.randn(24, 8)  # three of each
    >>> mixture = VMFMixture(torch.ones(24), directions, torch.full((24,), 40.0))
    >>> features, _ = mixture.sample(2000, torch.Generator().manual_seed(0))
    >>> found = compress_mixture(mixture, features, 0.02)
    >>> found.mixture.num_components, found.total_variation < 0.02
    (8, True)
    """
    bound = positive("total_variation", total_variation)
    if not bound < 1:
        raise ValueError(f"`total_variation` (={total_variation}) must lie between 0 and 1")
    if features.dim() != 2 or features.shape[1] != mixture.dim or not len(features):
        raise ValueError(f"`features` (of shape {tuple(features.shape)}) must have shape (N >= 1, {mixture.dim})")
    share = _mean_responsibility(mixture, features)
    order = share.argsort(descending=True)
    left_out = order[share[order].flip(0).cumsum(0).flip(0) < bound / 2]
    kept = order[: len(order) - len(left_out)]

    single = _merged(mixture, kept, 1.0)  # each for itself, but for exact copies
    found = CompressedMixture(*single, _total_variation(mixture, *single, features))
    for overlap in OVERLAPS:
        candidate = _merged(mixture, kept, overlap)
        distance = _total_variation(mixture, *candidate, features)
        if not distance < bound:
            break
        found = CompressedMixture(*candidate, distance)
    return found


def _chunks(mixture: VMFMixture, features: Tensor) -> tuple[Tensor, ...]:
    return features.split(rows_per_chunk(mixture.num_components, features.device, buffers=3))


def _mean_responsibility(mixture: VMFMixture, features: Tensor) -> Tensor:
    total = torch.zeros(mixture.num_components, dtype=torch.float64, device=mixture.kappa.device)
    for chunk in _chunks(mixture, features):
        total += mixture.responsibilities(chunk).sum(0, dtype=torch.float64)
    return total / len(features)


def _merged(mixture: VMFMixture, kept: Tensor, overlap: float) -> tuple[VMFMixture, Tensor]:
    """The components `kept`, in that order, merged from this overlap on; and the group (K,) of each old one or -1."""
    m = mixture.to(torch.float64)
    group = torch.full((m.num_components,), -1, dtype=torch.int64, device=m.kappa.device)
    pending, leaders = kept, 0
    while len(pending):
        leader = pending[:1]
        coefficient = bhattacharyya_coefficient(
            m.directions[leader], m.kappa[leader], m.directions[pending], m.kappa[pending]
        )[0]
        joins = coefficient >= overlap
        joins[0] = True
        group[pending[joins]] = leaders
        pending, leaders = pending[~joins], leaders + 1
    member = group >= 0
    weight = m.weights.new_zeros(leaders).index_add_(0, group[member], m.weights[member])
    mean = (m.weights * vmf_mean_resultant(m.kappa, m.dim))[:, None] * m.directions
    total = mean.new_zeros(leaders, m.dim).index_add_(0, group[member], mean[member])
    alone = torch.bincount(group[member], minlength=leaders) == 1
    resultant = torch.linalg.vector_norm(total, dim=1) / weight
    kappa = vmf_concentration(resultant.clamp(max=1), m.dim)
    first = kept.new_empty(leaders)
    first[group[kept.flip(0)]] = kept.flip(0)  # the leader of each group, which is written last
    # A component without a partner stays as it is: the way to its mean and back would round it, or lose it at kappa 0.
    kappa = torch.where(alone, m.kappa[first], kappa)
    directions = torch.where(alone[:, None] | (total == 0).all(1, keepdim=True), m.directions[first], total)
    return VMFMixture(weight, F.normalize(directions, dim=1), kappa).to(mixture.kappa.dtype), group


def _total_variation(old: VMFMixture, new: VMFMixture, group: Tensor, features: Tensor) -> float:
    total = 0.0
    member = group >= 0
    for chunk in _chunks(old, features):
        r = old.responsibilities(chunk)
        grouped = r.new_zeros(len(chunk), new.num_components).index_add_(1, group[member], r[:, member])
        difference = (grouped - new.responsibilities(chunk)).abs().sum() + r[:, ~member].sum()
        total += difference.double().item() / 2
    return total / len(features)
