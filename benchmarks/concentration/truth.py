"""The table of exact values in tests/data/concentration_truth.csv."""

import csv
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from benchmarks.normalizer.truth import TABLE as NORMALIZER_TABLE
from benchmarks.normalizer.truth import Exact, exact_column

TABLE = NORMALIZER_TABLE.with_name("concentration_truth.csv")


@dataclass(frozen=True)
class Truth:
    """All rows of one dimension and one kind of argument, in ascending order (values that float32 holds exactly)."""

    p: int
    given: str  # "resultant" or "complement"
    argument: np.ndarray
    kappa: Exact
    slope: Exact  # dkappa/dR


@lru_cache(maxsize=1)
def load_truth() -> dict[tuple[int, str], Truth]:
    """The whole table by dimension p and kind of argument."""
    rows: dict[tuple[int, str], list[dict[str, str]]] = {}
    with TABLE.open(newline="") as file:
        for row in csv.DictReader(file):
            rows.setdefault((int(row["p"]), row["given"]), []).append(row)
    return {
        key: Truth(
            *key,
            np.array([float(row["argument"]) for row in group]),
            *(exact_column(group, name) for name in ("kappa", "slope")),
        )
        for key, group in rows.items()
    }
