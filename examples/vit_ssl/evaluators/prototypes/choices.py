"""Which prototype each image chooses, and how kNN does on images of broad and of narrow components."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from evaluators.prototypes.components import Components

CHUNK_ELEMENTS = 2**24
"""So many scores are computed at a time: 64 MiB of float32."""


class Choices(NamedTuple):
    """The prototypes that N images choose, by score, by logit and by target."""

    y: Tensor
    """Unit vectors (N, p)."""
    prototypes: dict[str, Tensor]
    """The prototype (N,) with the largest of "scores", of "logits" and, where the centre is known, of "targets"."""
    entropies: dict[str, float]
    """In nats: the mean entropy of the targets, "target_entropy", and that of their mean, "marginal_entropy"."""


@torch.inference_mode()
def choose(components: Components, x: np.ndarray, rows: np.ndarray) -> Choices:
    """Return the choices of `rows` of the backbone features (N, D), in chunks."""
    weight = components.prototypes
    y, chosen = [], {"scores": [], "logits": []} | ({"targets": []} if components.targets else {})
    marginal, entropy = torch.zeros(len(weight), dtype=torch.float64, device=weight.device), 0.0
    size = max(1, CHUNK_ELEMENTS // len(weight))
    for first in tqdm(range(0, len(rows), size), desc="prototypes", unit="chunk", leave=False):
        y.append(components.project(torch.from_numpy(x[rows[first : first + size]]).to(weight.device).float()))
        scores = y[-1] @ weight.T
        chosen["scores"].append(scores.argmax(dim=1))
        chosen["logits"].append(components.logits(scores).argmax(dim=1))
        if components.targets:
            targets = components.targets(scores)
            chosen["targets"].append(targets.argmax(dim=1))
            entropy += torch.special.entr(targets).sum().item()
            marginal += targets.sum(dim=0, dtype=torch.float64)
    mean = torch.special.entr(marginal / len(rows)).sum().item()
    entropies = {"target_entropy": entropy / len(rows), "marginal_entropy": mean} if components.targets else {}
    return Choices(torch.cat(y), {name: torch.cat(parts) for name, parts in chosen.items()}, entropies)


def by_kappa(kappa: np.ndarray, correct: np.ndarray, ranges: int) -> Iterator[dict[str, Any]]:
    """Yield the accuracy of the images whose kappa (N,) lies in each of `ranges` equal ranges of its percentiles.

    Equal values stay together, in the range of their middle: ranges differ in size, empty ones are left out. Nothing
    where all are equal.
    """
    if np.ptp(kappa) <= 1e-6 * kappa.max():
        return
    before, until = (np.searchsorted(np.sort(kappa), kappa, side) for side in ("left", "right"))
    which = ((before + until) / 2 / len(kappa) * ranges).astype(int)
    for index in np.unique(which):
        inside = which == index
        low, high = (100 * edge / ranges for edge in (index, index + 1))
        top1 = correct[inside].mean()
        yield {
            "percentiles": f"{low:.0f}-{high:.0f}",
            "kappa_low": float(kappa[inside].min()),
            "kappa_high": float(kappa[inside].max()),
            "n": int(inside.sum()),
            "top1": float(top1),
            "standard_error": float(np.sqrt(top1 * (1 - top1) / inside.sum())),
        }
