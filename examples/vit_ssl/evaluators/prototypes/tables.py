"""The tables in OUTPUT/prototypes/, from which the charts are drawn."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

DUPLICATES, PROTOTYPES, BY_KAPPA = "duplicates.csv", "prototypes.csv", "knn_by_kappa.csv"


def write_table(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows with the same keys as CSV; no rows make no file."""
    rows = list(rows)
    path.unlink(missing_ok=True)
    if not rows:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


def read_table(path: Path) -> dict[str, np.ndarray]:
    """Return the columns of a CSV file with a header; numbers where all of a column are."""
    with path.open(newline="") as file:
        header, *rows = csv.reader(file)
    columns = {}
    for name, column in zip(header, zip(*rows, strict=True), strict=True):
        try:
            columns[name] = np.array(column, float)
        except ValueError:
            columns[name] = np.array(column)
    return columns
