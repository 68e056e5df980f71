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

# So many rows of each rank are kept as places for components that have become empty.
SPARE_ROWS = 32


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


class Spares:
    """A few rows, drawn with probabilities proportional to 1 - cosine to their most probable component.

    Of all rows those are kept whose log(1 - cosine) plus Gumbel noise is largest: a weighted sample without
    replacement, in one pass.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator
        self._keys = torch.empty(0)
        self._rows = torch.empty(0)

    def add_(self, rows: Tensor, cosine: Tensor) -> None:
        """Consider these rows (n, p) with their cosines (n,)."""
        uniform = torch.rand(len(rows), generator=self._generator).clamp(min=1e-30)
        keys = (1 - cosine.float().cpu()).clamp(min=1e-12).log() - (-uniform.log()).log()
        if len(self._keys):
            keys, rows = torch.cat([self._keys, keys]), torch.cat([self._rows, rows])
        self._keys, best = keys.topk(min(SPARE_ROWS, len(keys)))
        self._rows = rows[best.to(rows.device)]

    def gathered(self, process_group: dist.ProcessGroup | None) -> Tensor:
        """The rows of all ranks, each the farthest from those before it; every rank must call."""
        keyed = torch.cat([self._keys[:, None].to(self._rows), self._rows], dim=1)
        keyed = gather_rows(keyed, SPARE_ROWS, process_group)
        rows = keyed[:, 1:]
        order = [int(keyed[:, 0].argmax())]
        cosine = rows @ rows.T
        while len(order) < len(rows):
            nearest = cosine[:, order].amax(dim=1)
            nearest[order] = torch.inf
            order.append(int(nearest.argmin()))
        return rows[order]


@torch.no_grad()
def expectation(
    mixture: VMFMixture,
    features: Tensor,
    process_group: dist.ProcessGroup | None = None,
    spares: Spares | None = None,
) -> Statistics:
    """The E-step over unit vectors (N, p), in chunks: no tensor (N, K) exists. One all-reduce sums over the ranks."""
    scaled, offset = mixture.natural_parameters()
    columns = mixture.dim + 1
    # One tensor, so that one all-reduce does: a row for each component, and one for the likelihood and the rows.
    sums = torch.zeros(mixture.num_components + 1, columns, dtype=torch.float64, device=scaled.device)
    with without_autocast(scaled.device):
        for chunk in features.split(rows_per_chunk(mixture.num_components, scaled.device, buffers=3)):
            y = chunk.to(scaled)
            joint = F.linear(y, scaled, offset)
            log_prob = joint.logsumexp(dim=1, keepdim=True)
            if spares is not None:
                winner = mixture.directions[joint.argmax(dim=1)]
                spares.add_(y, (y * winner).sum(dim=1))
            responsibility = joint.sub_(log_prob).exp_()
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
    directions = torch.where(known[:, None], statistics.total, old.directions)
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
