"""The table of exact values in tests/data/normalizer_truth.csv, and errors measured in units of rounding."""

import csv
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from pathlib import Path

import numpy as np

TABLE = Path(__file__).parents[2] / "tests" / "data" / "normalizer_truth.csv"
QUANTITIES = ("log_c_relative", "log_c", "mean_resultant", "slope")


@dataclass(frozen=True)
class Exact:
    """Exact numbers as unevaluated sums of two float64, `high + low`, so that a float64 result can be scored."""

    high: np.ndarray
    low: np.ndarray

    def error(self, got: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """Signed error of `got` in units of `eps(dtype) * |exact|`; a measure where the exact number is `normal`."""
        # `got - high` is exact when the two are within a factor of two (Sterbenz), which is when the result matters.
        difference = (got.astype(np.float64) - self.high) - self.low
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            return difference / np.abs(self.high) / float(np.finfo(dtype).eps)

    def normal(self, dtype: np.dtype) -> np.ndarray:
        """Where the exact number is a normal number of `dtype`, so that a relative error can be promised."""
        return np.abs(self.high) >= float(np.finfo(dtype).tiny)


@dataclass(frozen=True)
class Truth:
    """All rows of one dimension, in ascending kappa (float64 values that float32 holds exactly)."""

    p: int
    kappa: np.ndarray
    log_c_relative: Exact
    log_c: Exact
    mean_resultant: Exact
    slope: Exact


@lru_cache(maxsize=1)
def load_truth() -> dict[int, Truth]:
    """The whole table by dimension p, ascending."""
    rows: dict[int, list[dict[str, str]]] = {}
    with TABLE.open(newline="") as file:
        for row in csv.DictReader(file):
            rows.setdefault(int(row["p"]), []).append(row)
    return {
        p: Truth(p, np.array([float(r["kappa"]) for r in group]), *(exact_column(group, name) for name in QUANTITIES))
        for p, group in sorted(rows.items())
    }


def exact_column(rows: list[dict[str, str]], name: str) -> Exact:
    """The column `name` of rows of decimal numbers."""
    values = [Decimal(row[name]) for row in rows]
    high = [float(value) for value in values]
    low = [float(value - Decimal(h)) for value, h in zip(values, high, strict=True)]
    return Exact(np.array(high), np.array(low))
