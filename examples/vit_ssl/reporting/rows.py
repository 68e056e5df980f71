"""The numbers of evaluations as rows: made from metrics, appended to results.jsonl, printed as a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from evaluators.protocol import Metric
from storage.json_lines import Row, read_rows
from storage.whole_file import whole_file

RESULTS = "results.jsonl"
NOTES = ("k", "C", "lr", "weight_decay", "clusters", "sd", "se", "draws", "cosine")
"""These are shown in the table where a row has them."""


def make_rows(metrics: Iterable[Metric], **common: Any) -> list[Row]:
    """Return a row for each metric; its options come last and replace what they name."""
    common["date"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return [
        {key: common[key] for key in ("protocol", "features", "split")}
        | {"metric": metric.name, "value": metric.value}
        | common
        | metric.options
        for metric in metrics
    ]


def read_results(output: Path) -> list[Row]:
    """Return all rows of OUTPUT/results.jsonl that are whole."""
    return read_rows(output / RESULTS)


def save_predictions(output: Path, protocol: str, features: str, split: str, metrics: Iterable[Metric]) -> None:
    """Write the predicted labels to OUTPUT/predictions/PROTOCOL-FEATURES-SPLIT.npy; a second metric's name is added."""
    folder = output / "predictions"
    for number, metric in enumerate(metric for metric in metrics if metric.predictions is not None):
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{protocol}-{features}-{split}" + (f"-{metric.name}" if number else "")
        with whole_file(folder / f"{name}.npy") as file:
            np.save(file, metric.predictions)


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown; the first line is its head."""
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    rule = ["---"] * len(escaped[0])
    return "\n".join(f"| {' | '.join(line)} |" for line in [escaped[0], rule, *escaped[1:]])


def read_predictions(output: Path, protocol: str, features: str, split: str) -> np.ndarray:
    """Return the predicted labels (N,) that `save_predictions` wrote of the first metric."""
    return np.load(output / "predictions" / f"{protocol}-{features}-{split}.npy")


def print_table(rows: Iterable[Row]) -> None:
    """Print one line per metric, with the settings behind it."""
    rows = list(rows)
    width = max([13, *(len(row["metric"]) for row in rows)])
    print(f"{'protocol':<12} {'features':<9} {'split':<6} {'metric':<{width}} {'value':>9}")
    for row in rows:
        value = f"{row['value']:9d}" if isinstance(row["value"], int) else f"{row['value']:9.3f}"
        notes = ", ".join(f"{key} {row[key]:.3g}" for key in NOTES if key in row)
        line = f"{row['protocol']:<12} {row['features']:<9} {row['split']:<6} {row['metric']:<{width}} {value}  {notes}"
        print(line.rstrip())
