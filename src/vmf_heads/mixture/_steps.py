"""The two steps of EM for a mixture of von Mises-Fisher distributions.

[1] Banerjee, Dhillon, Ghosh, Sra, "Clustering on the unit hypersphere using von Mises-Fisher distributions", JMLR 6,
2005, section 4, whose approximate kappa is replaced by the exact one.
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
from ..special import vmf_mean_resultant
from ._ranks import gather_rows
from .concentration import vmf_concentration
from .distribution import VMFMixture

PLACES = 32  # rows of each rank at most that components which have become empty are moved to, after one pass
CANDIDATES = 4096  # rows of each rank that those are drawn from


@dataclass(frozen=True)
class Statistics:
    """What the M-step needs to know of the rows, summed over all ranks; float64."""

    weight: Tensor  # (K,) sum of the responsibilities
    total: Tensor  # (K, p) sum of the rows, each times its responsibility
    log_likelihood: float  # sum of log_prob, nats
    rows: int

    def mean(self) -> Statistics:
        """The same per row."""
        n = self.rows
        return Statistics(self.weight / n, self.total / n, self.log_likelihood / n, 1)


@torch.no_grad()
def expectation(mixture: VMFMixture, features: Tensor, process_group: dist.ProcessGroup | None = None) -> Statistics:
    """The E-step over unit vectors (N, p), in chunks: no tensor (N, K) exists. One all-reduce sums over the ranks.

    It costs little more than its two matrix products. The likelihood comes from the softmax: of every row,
    log sum exp of the joint = its largest joint - log of its largest responsibility, which is at least 1/K.
    """
    scaled, offset = mixture.natural_parameters()
    columns = mixture.dim + 1
    # One tensor, so that one all-reduce does: a row for each component, and one for the likelihood and the rows.
    sums = torch.zeros(mixture.num_components + 1, columns, dtype=torch.float64, device=scaled.device)
    with without_autocast(scaled.device):
        for chunk in features.split(rows_per_chunk(mixture.num_components, scaled.device, buffers=3)):
            y = chunk.to(scaled)
            joint = F.linear(y, scaled, offset)
            responsibility = joint.softmax(dim=1)
            log_prob = joint.amax(dim=1) - responsibility.amax(dim=1).log()
            sums[:-1, 0] += responsibility.sum(dim=0)
            sums[:-1, 1:] += responsibility.T @ y
            sums[-1, 0] += log_prob.sum(dtype=torch.float64)
            sums[-1, 1] += len(y)
    all_reduce_sum_(sums, process_group)
    return Statistics(sums[:-1, 0], sums[:-1, 1:], sums[-1, 0].item(), int(sums[-1, 1].item()))


@torch.no_grad()
def maximisation(statistics: Statistics, old: VMFMixture, max_kappa: float) -> VMFMixture:
    """The M-step: the mixture of the largest expected log-likelihood among those with kappa <= `max_kappa`.

    As a function of kappa that is n (log C_p(kappa) + kappa R), which is concave, so the bound cuts it off where it is
    still rising: the likelihood never falls, with the bound as without it.
    """
    length = torch.linalg.vector_norm(statistics.total, dim=1)
    known = length > 0  # a component without any row stays where it is
    resultant = torch.where(known, length / statistics.weight, 0).clamp(max=1)
    kappa = vmf_concentration(resultant, old.dim).clamp(max=max_kappa)
    # Of unit length before it is rounded: that of a component which explains hardly any row underflows in float32.
    directions = torch.where(known[:, None], statistics.total / length[:, None], old.directions)
    return VMFMixture(statistics.weight.to(old.kappa), directions.to(old.kappa), kappa.to(old.kappa))


def statistics_of(mixture: VMFMixture) -> Statistics:
    """The expected statistics of one row of the mixture itself: what the M-step would turn into this mixture again."""
    weight = mixture.weights.double()
    total = (weight * vmf_mean_resultant(mixture.kappa.double(), mixture.dim))[:, None] * mixture.directions.double()
    return Statistics(weight, total, 0.0, 1)


def reseed(mixture: VMFMixture, empty: Tensor, places: Tensor) -> VMFMixture:
    """The mixture with its first components of `empty` (K,) moved to the `places` (n, p).

    A moved component has the median kappa and weight of those that are not empty.
    """
    moved = empty.nonzero().flatten()[: len(places)]
    weights, directions, kappa = (tensor.clone() for tensor in (mixture.weights, mixture.directions, mixture.kappa))
    directions[moved] = places[: len(moved)].to(directions)
    weights[moved] = weights[~empty].median()
    kappa[moved] = kappa[~empty].median()
    return VMFMixture(weights, directions, kappa)


@torch.no_grad()
def distant_rows(
    mixture: VMFMixture, features: Tensor, generator: torch.Generator, process_group: dist.ProcessGroup | None = None
) -> Tensor:
    """Places (n, p) for components that have become empty, from the rows of all ranks; every rank must call.

    Each rank draws up to `PLACES` rows with probabilities proportional to 1 - cosine to their most probable component,
    the rule of k-means++, from `CANDIDATES` rows that it drew uniformly. In the result each row is the farthest from
    those before it.
    """
    index = torch.randperm(len(features), generator=generator)[:CANDIDATES]
    rows = features[index.to(features.device)].to(mixture.directions)
    cosine = rows.new_empty(len(rows))
    size = rows_per_chunk(mixture.num_components, rows.device)
    for chunk, out in zip(rows.split(size), cosine.split(size), strict=True):
        winner = mixture.directions[mixture.log_joint(chunk).argmax(dim=1)]
        torch.sum(chunk * winner, dim=1, out=out)
    distance = (1 - cosine.double().cpu()).clamp(min=1e-12)
    if len(rows) > PLACES:
        rows = rows[torch.multinomial(distance, PLACES, generator=generator).to(rows.device)]
    rows = gather_rows(rows, PLACES, process_group)
    order = [0]
    between = rows @ rows.T
    while len(order) < len(rows):
        nearest = between[:, order].amax(dim=1)
        nearest[order] = torch.inf
        order.append(int(nearest.argmin()))
    return rows[order]
