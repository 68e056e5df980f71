"""Out of a local maximum of EM: two components that share one cluster become one, and one that holds two becomes two.

[1] Ueda, Nakano, Ghahramani, Hinton, "SMEM algorithm for mixture models", Neural Computation 12, 2000, whose moves are
made here several at a time, and chosen by how much each changes the likelihood of the rows with their most probable
components, which needs no more than the number and the sum of the rows of each component and of its two halves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from .._distributed import all_reduce_sum_
from .._matmul import without_autocast
from .._memory import rows_per_chunk
from ..special import log_vmf_normalizer
from .concentration import vmf_concentration
from .distribution import VMFMixture

HALVING_PASSES = 6  # of 2-means in each component
NEIGHBOURS = 3  # of each component: those that it may be merged with
SMALLEST_SHARE = 1 / 8  # of the average component's rows: halves with fewer are not worth a component


@dataclass(frozen=True)
class _Parts:
    """Some sets of rows, summed over all ranks, each as one von Mises-Fisher component; all float64."""

    weight: Tensor  # (...) number of rows
    total: Tensor  # (..., p) their sum
    kappa: Tensor  # (...)
    value: Tensor  # (...) log-likelihood of the rows and of their choice of this component, but for a constant

    @property
    def directed(self) -> Tensor:
        """Whether the sum of the rows has a direction; it has none without rows."""
        return (self.total != 0).any(dim=-1)

    @staticmethod
    def of(weight: Tensor, total: Tensor, max_kappa: float) -> _Parts:
        p = total.shape[-1]
        resultant = (torch.linalg.vector_norm(total, dim=-1) / weight.clamp(min=1)).clamp(max=1)
        kappa = vmf_concentration(resultant, p).clamp(max=max_kappa)
        value = torch.special.xlogy(weight, weight) + weight * (log_vmf_normalizer(kappa, p) + kappa * resultant)
        return _Parts(weight, total, kappa, value)


@torch.no_grad()
def split_and_merge(
    mixture: VMFMixture,
    features: Tensor,
    rows: int,
    max_kappa: float,
    least_gain: float,
    generator: torch.Generator,
    process_group: dist.ProcessGroup | None = None,
) -> tuple[VMFMixture, int]:
    """The mixture after every move that is expected to raise the likelihood, and their number; every rank must call.

    A move merges two components with near directions, and gives the one that this frees to a third, which it splits.

    Args:
        mixture: K components.
        features: of each rank its own unit vectors (n, p).
        rows: of all ranks together.
        max_kappa: upper bound of every kappa.
        least_gain: in nats per row of `features`; no move is made where all together promise less.
        generator: of this rank.
        process_group: the ranks.
    """
    count = mixture.num_components
    if count < 3:
        return mixture, 0
    with without_autocast(features.device):
        halves = _halves(mixture, features, max_kappa, generator, process_group)
        first, second = _near_pairs(mixture.directions)
    whole = _Parts.of(halves.weight.sum(dim=1), halves.total.sum(dim=1), max_kappa)
    gain = halves.value.sum(dim=1) - whole.value
    small = halves.weight < max(2.0, SMALLEST_SHARE * rows / count)
    gain[(small | ~halves.directed).any(dim=1)] = -torch.inf

    merged = _Parts.of(whole.weight[first] + whole.weight[second], whole.total[first] + whole.total[second], max_kappa)
    cost = whole.value[first] + whole.value[second] - merged.value
    cost[~merged.directed] = torch.inf

    moves, promised = _moves(first, second, cost, gain)
    if promised < least_gain * rows or not moves:
        return mixture, 0
    pair, split = torch.tensor(moves, device=cost.device).unbind(1)
    kept, freed = first[pair], second[pair]
    weights, directions, kappa = mixture.weights * rows, mixture.directions.clone(), mixture.kappa.clone()
    for index, parts, part in ((kept, merged, pair), (split, halves, (split, 0)), (freed, halves, (split, 1))):
        weights[index] = parts.weight[part].to(weights)
        directions[index] = F.normalize(parts.total[part], dim=-1).to(directions)
        kappa[index] = parts.kappa[part].to(kappa)
    return VMFMixture(weights, directions, kappa), len(moves)


def _halves(
    mixture: VMFMixture,
    features: Tensor,
    max_kappa: float,
    generator: torch.Generator,
    process_group: dist.ProcessGroup | None,
) -> _Parts:
    """Two parts (K, 2) of the rows that each component is the most probable one of.

    They come from 2-means on the sphere, from the component's direction and one of its rows, which is drawn with a
    probability proportional to 1 - cosine to that direction, as k-means++ does.
    """
    count, p = mixture.directions.shape
    size = rows_per_chunk(count, features.device)
    winner = torch.cat([mixture.log_joint(chunk.to(mixture.kappa)).argmax(dim=1) for chunk in features.split(size)])
    size = rows_per_chunk(4 * p, features.device)
    chunks = list(zip(features.split(size), winner.split(size), strict=True))

    # The largest of log probability + Gumbel noise is a draw with that probability.
    noise = torch.empty(len(features)).exponential_(generator=generator).log().to(mixture.directions)
    far = torch.cat(
        [(1 - (chunk.to(mixture.directions) * mixture.directions[index]).sum(dim=1)) for chunk, index in chunks]
    )
    key = far.clamp(min=1e-12).log() - noise
    largest = key.new_full((count,), -torch.inf).scatter_reduce_(0, winner, key, "amax")
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=process_group)
    drawn = (key == largest[winner]).nonzero()[:, 0]
    seeds = torch.zeros_like(mixture.directions)
    seeds[winner[drawn]] = features[drawn].to(seeds)
    all_reduce_sum_(seeds, process_group)

    centres = torch.stack([mixture.directions, seeds], dim=1)  # (K, 2, p)
    for _ in range(HALVING_PASSES):
        sums = torch.zeros(2 * count, p + 1, dtype=torch.float64, device=features.device)
        for chunk, index in chunks:
            y = chunk.to(centres)
            nearer = torch.einsum("np,ncp->nc", y, centres[index]).argmax(dim=1)
            part = 2 * index + nearer
            sums[:, 0] += torch.bincount(part, minlength=2 * count)
            sums[:, 1:].index_add_(0, part, y.double())
        all_reduce_sum_(sums, process_group)
        sums = sums.view(count, 2, p + 1)
        centres = F.normalize(sums[..., 1:], dim=-1).to(centres)
    return _Parts.of(sums[..., 0], sums[..., 1:], max_kappa)


def _near_pairs(directions: Tensor) -> tuple[Tensor, Tensor]:
    """Each component with its `NEIGHBOURS` nearest, as two index tensors; a pair may be there twice."""
    count = len(directions)
    neighbours = min(NEIGHBOURS, count - 1)
    nearest = []
    for own in torch.arange(count, device=directions.device).split(rows_per_chunk(count, directions.device)):
        cosine = directions[own] @ directions.T
        cosine[torch.arange(len(own), device=own.device), own] = -torch.inf
        nearest.append(cosine.topk(neighbours, dim=1).indices)
    first = torch.arange(count, device=directions.device).repeat_interleave(neighbours)
    return first, torch.cat(nearest).flatten()


def _moves(first: Tensor, second: Tensor, cost: Tensor, gain: Tensor) -> tuple[list[tuple[int, int]], float]:
    """Which pairs to merge and which component to split for each, and what that promises: the cheapest merge with the
    best split, and so on while that gains. No component takes part in two moves."""
    used: set[int] = set()
    splits = gain.argsort(descending=True).tolist()
    gains, costs, pairs = gain.tolist(), cost.tolist(), list(zip(first.tolist(), second.tolist(), strict=True))
    moves, promised = [], 0.0
    for pair in cost.argsort().tolist():
        if used & {*pairs[pair]}:
            continue
        split = next((k for k in splits if k not in used and k not in pairs[pair]), None)
        if split is None or gains[split] <= costs[pair]:
            break
        moves.append((pair, split))
        promised += gains[split] - costs[pair]
        used |= {*pairs[pair], split}
    return moves, promised
