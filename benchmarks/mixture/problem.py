"""Mixtures of known truth: clusters on a sphere whose concentrations differ by more than a factor of ten."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from examples.known_mixture import concentration, sample_vmf
from vmf_heads import log_vmf_normalizer, vmf_mean_resultant


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


def problem(p: int, seeds: list[int], *, clusters: int = 16, count: int = 500) -> Problem:
    """Clusters whose mean cosines are those of kappa = 15 to 300 (log-spaced) at p = 16, whatever `p`.

    The same kappa is another shape at another p: at p = 256 a cluster of kappa 15 is nearly uniform on the sphere.
    """
    ends = concentration(vmf_mean_resultant(torch.tensor([15.0, 300.0], dtype=torch.float64), 16), p).log()
    kappa = torch.linspace(float(ends[0]), float(ends[1]), clusters).exp()
    means, points = [], []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        means.append(F.normalize(torch.randn(clusters, p, generator=generator), dim=1))
        points.append(sample_vmf(means[-1], kappa, count, generator))
    return Problem(torch.stack(means), kappa, torch.stack(points))
