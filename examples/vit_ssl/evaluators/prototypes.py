"""How many prototypes are used, how precise they are, how many differ (section 5.2 of the paper)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from evaluators.features import FeaturesOf, Metric

if TYPE_CHECKING:
    from checkpoint import Run

COSINE = 0.9
QUANTILES = {"min": 0.0, "p05": 0.05, "p50": 0.5, "p95": 0.95, "max": 1.0}


@torch.inference_mode()
def prototypes(run: Run, features: FeaturesOf, *, rows: int = 256) -> Iterator[Metric]:
    """Statistics of the teacher's prototypes over the un-augmented train split.

    - `used_scores`: how many are the largest score ⟨w_k, y⟩ of some image; `used_targets`: how many the largest
      probability of some image's centred target (Eq. 7), which is what the student is taught.
    - `kappa_*`: quantiles of κ = ‖w‖ / τ_s, with the student's temperature.
    - `unique`: prototypes left when every one with a cosine above 0.9 to an earlier one is removed (Table 4).
    """
    weight_g = run.head.last_layer.weight_g
    epoch = min(run.epoch, run.recipe.epochs - 1)
    by_score, by_target = [], []
    for chunk in torch.from_numpy(features("train").x).to(weight_g.device).split(rows):
        scores = run.head(chunk)  # raw ⟨w, y⟩: the loss is attached
        by_score.append(scores.argmax(dim=1))
        by_target.append(run.loss.targets(scores, epoch).argmax(dim=1))
    yield Metric("prototypes", len(weight_g))
    yield Metric("used_scores", len(torch.cat(by_score).unique()))
    yield Metric("used_targets", len(torch.cat(by_target).unique()))
    kappa = weight_g.abs().flatten().float() / run.recipe.student_temp
    for name, quantile in QUANTILES.items():
        yield Metric(f"kappa_{name}", torch.quantile(kappa, quantile).item())
    yield Metric("unique", count_unique(run.head.last_layer.weight, COSINE), {"cosine": COSINE})


def count_unique(weight: Tensor, cosine: float, *, rows: int = 1024) -> int:
    """Rows of `weight` (K, p) left when, in order, each with a cosine above `cosine` to one already kept is removed."""
    kept = weight.new_empty(0, weight.shape[1])
    for chunk in F.normalize(weight, dim=1).split(rows):
        chunk = chunk[~(chunk @ kept.T > cosine).any(dim=1)]
        duplicates = (chunk @ chunk.T > cosine).triu(1)  # [i, j]: j repeats the earlier i
        alive = torch.ones(len(chunk), dtype=torch.bool, device=weight.device)
        for index in range(len(chunk)):
            if alive[index]:
                alive &= ~duplicates[index]
        kept = torch.cat([kept, chunk[alive]])
    return len(kept)
