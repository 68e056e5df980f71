"""What is logged: the statistics of a step, averaged over micro-batches and processes, and metrics.jsonl."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from config.recipe import load_recipe
from runtime.distributed import gather_rows
from storage.json_lines import parsed, read_rows
from storage.whole_file import whole_file

METRICS = "metrics.jsonl"
CURVES = "tensorboard"
QUANTILES = {"5 %": "kappa_p05", "median": "kappa_p50", "95 %": "kappa_p95"}


def mean_statistics(micro_batches: list[dict[str, float | Tensor]], signal: int = 0) -> tuple[dict[str, float], int]:
    """Return a step's statistics, averaged over micro-batches and processes, and the largest `signal` of any process.

    Loss, entropies and KL are means over images, so this is what one process would have found, but for
    `marginal_entropy` and `prototypes_used`: those are of the sample that one process sees of one micro-batch. (Where a
    micro-batch has more teacher rows than the statistics look at, entropies and KL are estimates from these.)
    One collective, and one wait for the device.
    """
    names = list(micro_batches[0])
    where = next((value.device for value in micro_batches[0].values() if isinstance(value, Tensor)), None)
    values = [
        torch.as_tensor(found[name], dtype=torch.float64, device=where) for found in micro_batches for name in names
    ]
    means = torch.stack(values).view(len(micro_batches), len(names)).mean(0)
    *columns, signals = zip(*gather_rows(torch.cat([means, means.new_tensor([signal])])).tolist(), strict=True)
    return {name: sum(column) / len(column) for name, column in zip(names, columns, strict=True)}, int(max(signals))


class MetricsLog:
    """Appends JSON rows to DIRECTORY/metrics.jsonl and flushes them, so that a run can be watched.

    With `curves` they also go to DIRECTORY/tensorboard for `tensorboard --logdir`. Rows of steps after `step`, which a
    crash leaves behind, are forgotten. Raises ImportError when tensorboard is not installed.
    """

    def __init__(self, directory: Path, *, step: int, curves: bool = False) -> None:
        self._curves = _curves(directory / CURVES, step) if curves else None
        path = directory / METRICS
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if line.endswith(b"\n") and _step(line) <= step]
        if kept != lines:
            with whole_file(path) as file:
                file.writelines(kept)
        self._file = path.open("a")

    def write(self, row: Mapping[str, float]) -> None:
        """Append a row, whose `step` is the horizontal axis of the curves."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._curves is not None:
            for name, value in row.items():
                self._curves.add_scalar(name, value, int(row["step"]))

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._curves is not None:
            self._curves.close()


def summary(output: Path) -> list[str]:
    """Return how a run went by its metrics.jsonl, in a few lines for a person; none where it has no row."""
    rows = read_rows(output / METRICS)
    if not rows:
        return []
    first, last, size = rows[0], rows[-1], load_recipe(output / "recipe.yaml").out_dim
    end = rows[-20:]
    loss, speed = (sum(row[name] for row in end) / len(end) for name in ("loss", "images_per_second"))
    lines = [f"loss: {first['loss']:.3f} at step {first['step']}, {loss:.3f} at the end; ln K is {math.log(size):.3f}"]
    if used := last.get("prototypes_used"):
        lines.append(f"prototypes: {used:.0f} of {size} are the largest target of some crop in the last step")
    if "kappa_p05" in last:
        quantiles = ", ".join(f"{text} {last[name]:.3g}" for text, name in QUANTILES.items())
        lines.append(f"kappa of the prototypes: {quantiles}")
    looks = [row for row in rows if "feature_std" in row]
    if accuracies := [100 * row["knn_top1"] for row in looks if "knn_top1" in row]:
        lines.append(
            f"kNN on some validation images: {accuracies[0]:.1f} % at first, {accuracies[-1]:.1f} % at the end"
        )
    if looks:
        lines.append(f"its curves: {output / 'curves.html'}")
    return [*lines, f"time: {last['seconds']:.0f} s in {last['step']} steps, {speed:.0f} images/s at the end"]


def _step(line: bytes) -> float:
    step = (parsed(line) or {}).get("step")  # a line that was only half written has none
    return step if isinstance(step, int) else float("inf")


def _curves(directory: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("`tensorboard` (=True) needs that package: pip install 'vmf_heads[tensorboard]'") from error
    return SummaryWriter(str(directory), purge_step=step + 1)
