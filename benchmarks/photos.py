"""`python -m benchmarks photos`: what the ablation on the photographs has left in its runs, as a result file."""

from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from evaluate import evaluate
from evaluators.request import Request, Weights
from reporting.rows import read_results
from reporting.several_runs.numbers import Row, read_runs

ARMS = {
    "none-logit": "none, logit",
    "none-probability": "none, probability",
    "l2-logit": "L2, logit",
    "l2-probability": "L2, probability",
    "vmf-logit": "vMF, logit",
    "vmf-probability": "vMF, responsibilities",
    "vmf-scores": "vMF, scores",
}
"""The cells of ablation.py by the names of their runs, in the words of the other tables."""
RANGES = ("0-20", "20-40", "40-60", "60-80", "80-100")
SPLIT = "test"


def photos(*, runs: Path = Path("runs/ablation")) -> None:
    """Collect the runs of `ablation.py --recipe photos_dino_vmf --split test`, made on this machine.

    Nothing is trained; only kNN with raw pixels and with the networks before their first step is evaluated, where a
    run has no such row. Runs that have not been evaluated are left out.

    Args:
        runs: output directory of the ablation.
    """
    torch.set_num_threads(1)  # as in the runs
    rows, others = read_runs(runs, SPLIT)
    print(f"{len(rows)} runs; left out: {', '.join(others) or 'none'}")
    first = {row["seed"]: runs / f"{row['name']}-seed{row['seed']}" for row in reversed(rows)}
    references = {
        "raw_pixels_knn": knn(next(iter(first.values())), "pixels"),
        "untrained_knn": [knn(first[seed], "random") for seed in sorted(first)],
    }
    collected = sorted(
        (as_row(row) for row in rows), key=lambda row: (row["seed"], list(ARMS.values()).index(row["arm"]))
    )
    print(results.write("photos_table", "cpu", collected, cosines=rows[0]["cosines"], **references))


def as_row(row: Row) -> dict[str, Any]:
    """A run's numbers under the names that the rows on Fashion-MNIST have; None for a range of kappa without images."""
    return {
        "arm": ARMS[row["name"]],
        **{name: row[name] for name in ("seed", "normalization", "centering", "center_on", "knn", "seconds")},
        **{f"used_by_{kind}": row[f"used_{kind}"] for kind in ("scores", "logits", "targets")},
        "kappa_spread": row["kappa"]["p95"] / row["kappa"]["p05"],
        "knn_by_fifth": [row["by_kappa"].get(name) for name in RANGES],
        "unique": row["unique"],
        "largest_set": row["largest_set"],
        "used_over_time": row["over_time"]["prototypes_used"],
    }


def knn(run: Path, features: Weights) -> float:
    """The accuracy of kNN with raw pixels or with the network before its first step; evaluated where it is missing."""
    wanted = ("knn", features, SPLIT)
    rows = [row for row in read_results(run) if (row["protocol"], row["features"], row["split"]) == wanted]
    return (rows or evaluate(Request(str(run), features=features, split=SPLIT), "knn"))[-1]["value"]
