"""What is logged at every step: statistics of targets and prototypes, and metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

METRICS = "metrics.jsonl"
KAPPA_QUANTILES = {"kappa_min": 0.0, "kappa_p05": 0.05, "kappa_p50": 0.5, "kappa_p95": 0.95, "kappa_max": 1.0}


def target_statistics(targets: Tensor, loss: Tensor) -> dict[str, Tensor]:
    """Entropies in nats of the teacher's targets (N, K), whose cross-entropy with the student is `loss`.

    `target_entropy` is their mean entropy (ln K: every target is uniform), `marginal_entropy` that of their mean (0:
    all images share one prototype), `kl` = loss - target_entropy the mean KL(target || student). A run that learns has
    a target entropy well below its marginal entropy; in a collapsed one they are equal.
    """
    target_entropy = torch.special.entr(targets).sum(-1).mean()
    marginal_entropy = torch.special.entr(targets.mean(0)).sum()
    return {"target_entropy": target_entropy, "marginal_entropy": marginal_entropy, "kl": loss - target_entropy}


def kappa_statistics(kappa: Tensor) -> dict[str, Tensor]:
    """Quantiles over the prototypes of their concentrations kappa = ||w|| / student_temp, (K,)."""
    quantiles = torch.quantile(kappa, kappa.new_tensor(list(KAPPA_QUANTILES.values())))
    return dict(zip(KAPPA_QUANTILES, quantiles, strict=True))


class MetricsLog:
    """Appends one JSON row per step to DIRECTORY/metrics.jsonl and flushes it, so that a run can be watched."""

    def __init__(self, directory: Path, *, step: int) -> None:
        # After a crash there may be rows of steps that the checkpoint does not know, the last one half written.
        path = directory / METRICS
        lines = path.read_text().splitlines() if path.exists() else []
        path.write_text("".join(f"{line}\n" for line in lines[:step]))
        self._file = path.open("a")

    def write(self, row: dict[str, Any]) -> None:
        """Append a row; tensors of one element become numbers."""
        numbers = {key: value.item() if isinstance(value, Tensor) else value for key, value in row.items()}
        self._file.write(json.dumps(numbers) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
