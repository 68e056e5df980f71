"""What the runs of several seeds have kept, one row per run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from config.recipe import load_recipe
from evaluators.prototypes.tables import DUPLICATES, read_table
from reporting.demo_table import read_rows
from training.log import METRICS

RUN = re.compile(r"(?P<name>.+)-seed(?P<seed>\d+)")
"""How ablation.py and seeds.py name the directory of a run."""
OVER_TIME = ("prototypes_used", "kappa_p05", "kappa_p95")
"""The columns of metrics.jsonl of which a row keeps the mean over every epoch."""

Row = dict[str, Any]


def read_runs(folder: Path, split: str) -> tuple[list[Row], list[str]]:
    """Return a row for every evaluated run FOLDER/NAME-seedN, by name and seed, and the names of the other runs.

    A run has been evaluated where kNN on `split` and the prototypes are in its results.jsonl. A row holds

    - `name`, `seed`, `normalization`, `centering`, `center_on`, `prototypes` (K) and `batch_size`;
    - `knn`, the teacher's accuracy, and `seconds`, the time spent in training steps;
    - `used_scores`, `used_logits`, `used_targets`: the share of the prototypes that are the largest for some image;
    - `kappa`, its quantiles over the prototypes;
    - `by_kappa`, the kNN accuracy of the images whose component has a kappa in a range of percentiles, by range
      (Figure 2), empty where all kappa are equal;
    - `cosines`, and for each of them `unique` and `largest_set`, shares of the prototypes (Figures 6 and 7);
    - `over_time`: what `OVER_TIME` names, a mean for every epoch.

    Raises FileNotFoundError when no run in `folder` has been evaluated.
    """
    rows, others = [], []
    for run, name, seed in _runs(folder):
        row = _row(run, split)
        if row is None:
            others.append(run.name)
        else:
            rows.append({"name": name, "seed": seed} | row)
    if not rows:
        found = f"{len(others)} runs NAME-seedN there have no results of kNN on {split} and of the prototypes"
        raise FileNotFoundError(
            f"`runs` (={str(folder)!r}) must hold evaluated runs of ablation.py or seeds.py: {found}"
        )
    return rows, others


def _runs(folder: Path) -> Iterator[tuple[Path, str, int]]:
    named = [
        (match["name"], int(match["seed"]), path) for path in folder.iterdir() if (match := RUN.fullmatch(path.name))
    ]
    for name, seed, path in sorted(named):
        if (path / "recipe.yaml").exists():
            yield path, name, seed


def _row(run: Path, split: str) -> Row | None:
    path = run / "results.jsonl"
    # Later rows replace earlier ones: an evaluation has been repeated.
    found = {
        (row["features"], row["protocol"], row["metric"], row["split"]): row["value"]
        for row in (read_rows(path) if path.exists() else [])
    }
    counted = {metric: value for (_, protocol, metric, _), value in found.items() if protocol == "prototypes"}
    knn = found.get(("teacher", "knn", "top1", split))
    if knn is None or not counted:
        return None
    recipe, size, steps = load_recipe(run / "recipe.yaml"), counted["prototypes"], read_rows(run / METRICS)
    duplicates = read_table(run / "prototypes" / DUPLICATES)
    ranges = "top1@kappa_"
    return {
        "normalization": recipe.normalization,
        "centering": recipe.centering,
        "center_on": recipe.center_on,
        "prototypes": size,
        "batch_size": recipe.batch_size,
        "knn": knn,
        "seconds": steps[-1]["seconds"],
        **{name: counted[name] / size for name in ("used_scores", "used_logits", "used_targets")},
        "kappa": {name: counted[f"kappa_{name}"] for name in ("min", "p05", "p50", "p95", "max")},
        "by_kappa": {
            metric.removeprefix(ranges): value
            for (_, _, metric, of), value in found.items()
            if metric.startswith(ranges) and of == split
        },
        "cosines": duplicates["cosine"].tolist(),
        "unique": (duplicates["unique"] / size).tolist(),
        "largest_set": (duplicates["largest_set"] / size).tolist(),
        "over_time": _over_time(steps),
    }


def _over_time(steps: list[Row]) -> dict[str, list[float]]:
    epochs = np.array([step["epoch"] for step in steps])
    return {
        name: [float(np.mean([step[name] for step in steps if step["epoch"] == epoch])) for epoch in np.unique(epochs)]
        for name in OVER_TIME
    }
