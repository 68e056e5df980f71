"""The numbers of evaluations as rows: made from metrics, appended to results.jsonl, printed as a table."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from evaluators.protocol import Metric

RESULTS = "results.jsonl"
NOTES = ("k", "C", "lr", "sd", "draws", "cosine")  # shown in the table where a row has them

Row = dict[str, Any]


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
    """Return all rows of OUTPUT/results.jsonl."""
    path = output / RESULTS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append_rows(output: Path, rows: Iterable[Row]) -> None:
    """Append to OUTPUT/results.jsonl."""
    output.mkdir(parents=True, exist_ok=True)
    with (output / RESULTS).open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def save_predictions(output: Path, protocol: str, features: str, split: str, metrics: Iterable[Metric]) -> None:
    """Write the predicted labels to OUTPUT/predictions/PROTOCOL-FEATURES-SPLIT.npy; a second metric's name is added."""
    folder = output / "predictions"
    for number, metric in enumerate(metric for metric in metrics if metric.predictions is not None):
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{protocol}-{features}-{split}" + (f"-{metric.name}" if number else "")
        np.save(folder / f"{name}.npy", metric.predictions)


def print_table(rows: Iterable[Row]) -> None:
    """Print one line per metric, with the settings behind it."""
    rows = list(rows)
    width = max([13, *(len(row["metric"]) for row in rows)])
    print(f"{'protocol':<11} {'features':<9} {'split':<6} {'metric':<{width}} {'value':>9}")
    for row in rows:
        value = f"{row['value']:9d}" if isinstance(row["value"], int) else f"{row['value']:9.3f}"
        notes = ", ".join(f"{key} {row[key]:.3g}" for key in NOTES if key in row)
        line = f"{row['protocol']:<11} {row['features']:<9} {row['split']:<6} {row['metric']:<{width}} {value}  {notes}"
        print(line.rstrip())
