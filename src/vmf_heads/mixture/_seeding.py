"""Where a fit starts: directions spread over the data, by k-means++ on the sphere.

[1] Arthur and Vassilvitskii, "k-means++: the advantages of careful seeding", SODA 2007.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .concentration import vmf_concentration
from .distribution import VMFMixture


def spread_out(points: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`count` of the unit vectors (N, p), and the cosine (N,) of each point to the nearest of them.

    The first is drawn uniformly. For each of the others a few candidates are drawn, with a probability proportional to
    1 - cosine to the nearest one that is chosen already, which is half the squared distance of [1]; the candidate that
    brings the points nearest is chosen, as in scikit-learn.
    """
    trials = 2 + int(math.log(count))
    choice = int(torch.randint(len(points), (1,), generator=generator))
    chosen = [choice]
    cosine = points @ points[choice]
    for _ in range(count - 1):
        distance = (1 - cosine).clamp(min=0).cpu()
        distance[chosen] = 0  # rounding would let a point be drawn twice
        if not distance.sum() > 0:  # fewer distinct points than components
            distance = torch.ones_like(distance)
        candidates = torch.multinomial(distance, trials, replacement=True, generator=generator)
        closer = torch.maximum(points @ points[candidates.to(points.device)].T, cosine[:, None])
        best = int(closer.sum(dim=0).argmax())
        chosen.append(int(candidates[best]))
        cosine = closer[:, best].contiguous()
    return points[chosen], cosine


def starting_mixture(points: Tensor, count: int, max_kappa: float, generator: torch.Generator) -> VMFMixture:
    """Equal weights, spread-out directions, and one kappa for all: that of the points around the nearest direction."""
    directions, cosine = spread_out(points, count, generator)
    resultant = cosine.double().mean().clamp(0, 1)
    kappa = vmf_concentration(resultant, points.shape[1]).clamp(max=max_kappa).expand(count)
    return VMFMixture(torch.ones_like(kappa), directions, kappa)
