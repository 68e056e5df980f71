"""Mixtures of known truth: clusters on a sphere whose concentrations differ by more than a factor of ten."""

from dataclasses import dataclass

import torch
from examples.known_mixture import concentration, sample_vmf
from torch import Tensor
from torch.nn import functional as F

from vmf_heads import log_vmf_normalizer, vmf_mean_resultant

OVERLAPPING = {8: (15.0, 300.0), 16: (15.0, 300.0), 64: (15.0, 300.0), 256: (30.0, 600.0)}
"""With kappas in this range, the true mixture confuses a few per cent of the points at that p."""


@dataclass(frozen=True)
class Problem:
    """Points of C von Mises-Fisher clusters, for S seeds at once."""

    means: Tensor  # (S, C, p)
    kappa: Tensor  # (C,)
    points: Tensor  # (S, C, count, p)

    def views(self, rows: int, generator: torch.Generator) -> Tensor:
        """Two views (S, 2 * rows, p), view by view, of random items: any two points of the item's cluster."""
        seeds, clusters, count, _ = self.points.shape
        cluster = torch.randint(clusters, (seeds, rows), generator=generator).repeat(1, 2)
        member = torch.randint(count, (seeds, 2 * rows), generator=generator)
        return self.points[torch.arange(seeds)[:, None], cluster, member]

    def oracle_purity(self) -> Tensor:
        """The share of points (S,) that the true mixture itself puts into their own cluster: the ceiling of purity."""
        p = self.points.shape[-1]
        logits = torch.einsum("scnp,skp->scnk", self.points, self.means * self.kappa[:, None])
        found = (logits + log_vmf_normalizer(self.kappa, p)).argmax(-1)
        return (found == torch.arange(len(self.kappa))[:, None]).float().mean((1, 2))


def problem(p: int, seeds: list[int], *, kind: str = "cosines", clusters: int = 16, count: int = 500) -> Problem:
    """Clusters in random directions whose `kappa` are log-spaced between two ends that differ by a factor of about 20.

    kind="cosines": the mean cosines are those of kappa = 15 to 300 at p = 16, whatever `p`. Random directions of a
    large space are nearly orthogonal, so the clusters overlap at p = 8 and are well apart at p = 64 and 256.
    kind="overlap": the ends are in `OVERLAPPING`, and the broad clusters overlap at every p.
    """
    if kind == "overlap":
        ends = torch.tensor(OVERLAPPING[p])
    else:
        ends = concentration(vmf_mean_resultant(torch.tensor(OVERLAPPING[16]).double(), 16), p)
    low, high = ends.log().tolist()
    kappa = torch.linspace(low, high, clusters).exp()
    means, points = [], []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        means.append(F.normalize(torch.randn(clusters, p, generator=generator), dim=1))
        points.append(sample_vmf(means[-1], kappa, count, generator))
    return Problem(torch.stack(means), kappa, torch.stack(points))
