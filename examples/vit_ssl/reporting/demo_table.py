"""What the demo's numbers say: its table, paired differences with standard errors, and sentences made from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from storage.json_lines import Row, read_rows

# Row of the table: (run whose directory holds its evaluations, what was evaluated).
MODELS = {
    "raw pixels": ("photos_dino_vmf", "pixels"),
    "randomly initialised ViT": ("photos_dino", "random"),
    "DINO": ("photos_dino", "teacher"),
    "DINO-vMF": ("photos_dino_vmf", "teacher"),
}
RUNS = {label: run for label, (run, features) in MODELS.items() if features == "teacher"}
ACCURACIES = {
    "kNN": ("knn", "top1"),
    "1-shot": ("fewshot", "1-shot"),
    "5-shot": ("fewshot", "5-shot"),
    "linear": ("linear", "top1"),
}
USE = {"used by logits": "used_logits", "used by targets": "used_targets"}
COLUMNS = (*USE, "κ 5–95 %", *ACCURACIES, "seconds")
STANDARD_ERRORS = 3.0
"""A difference smaller than this many standard errors is not called one."""


def is_evaluated(directory: Path, features: str) -> bool:
    """Return whether `evaluate.py all` has written everything that a table takes from these features of a run."""
    found = {row["protocol"] for row in read_rows(directory / "results.jsonl") if row["features"] == features}
    needed = {protocol for protocol, _ in ACCURACIES.values()}
    return found >= needed | ({"prototypes"} if features == "teacher" else set())  # others have none to count


def make_table(output: Path) -> list[Row]:
    """Return one row per model from the runs' results.jsonl; accuracies in [0, 1], None where a number does not exist.

    Each accuracy has its standard error beside it: binomial for `kNN` and `linear` (over test images), the standard
    deviation over training sets for the few-shot ones. `κ 5–95 %` has these two quantiles over the prototypes,
    `seconds` is the time spent in training steps.
    """
    table = []
    for model, (run, features) in MODELS.items():
        # Later rows replace earlier ones: an evaluation that was interrupted has been repeated.
        rows = {(row["protocol"], row["metric"]): row for row in read_rows(output / run / "results.jsonl")
                if row["features"] == features and row["split"] in ("test", "train")}  # fmt: skip
        pretrained = features == "teacher"
        entry: Row = {"model": model}
        for column, key in ACCURACIES.items():
            value, n = rows[key]["value"], rows[key]["n"]
            entry[column] = value
            entry[f"{column} ±"] = rows[key].get("sd", math.sqrt(value * (1 - value) / n))
        counted = {name: row["value"] for (protocol, name), row in rows.items() if protocol == "prototypes"}
        for name, metric in {"prototypes": "prototypes", **USE}.items():
            entry[name] = counted[metric] if pretrained else None
        entry["κ 5–95 %"] = [counted["kappa_p05"], counted["kappa_p95"]] if pretrained else None
        entry["seconds"] = read_rows(output / run / "metrics.jsonl")[-1]["seconds"] if pretrained else None
        table.append(entry)
    return table


def format_table(table: Sequence[Mapping[str, Any]]) -> str:
    """Return the table as text: accuracies in per cent, `kNN` with its standard error."""
    cells = [["", *COLUMNS], *([row["model"], *(format_cell(row, column) for column in COLUMNS)] for row in table)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    lines = [
        "  ".join(
            [line[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in cells
    ]
    return "\n".join(lines)


def format_cell(row: Mapping[str, Any], column: str) -> str:
    """Return one cell of the table."""
    value = row[column]
    if value is None:
        return "–"
    if column == "seconds":
        return f"{value:.0f}"
    if column in USE:
        return f"{value}/{row['prototypes']}"
    if column not in ACCURACIES:
        return "–".join(f"{quantile:.1f}" for quantile in value)
    return f"{100 * value:.1f} ± {100 * row[f'{column} ±']:.1f}"


def paired_difference(correct_a: np.ndarray, correct_b: np.ndarray) -> tuple[float, float]:
    """Return the mean of a - b over the same test images and its standard error; the arrays (N,) say which answers were
    right.
    """
    difference = correct_a.astype(float) - correct_b.astype(float)
    return float(difference.mean()), float(difference.std(ddof=1) / math.sqrt(len(difference)))


def compare_knn(output: Path, labels: np.ndarray) -> list[Row]:
    """Return the kNN accuracies on test against each other, image by image: pretrained with baselines, and with each
    other.
    """
    correct = {}
    for model, (run, features) in MODELS.items():
        correct[model] = np.load(output / run / "predictions" / f"knn-{features}-test.npy") == labels
    baselines = [model for model in MODELS if model not in RUNS]
    pairs = [(model, baseline) for model in RUNS for baseline in baselines] + [("DINO-vMF", "DINO")]
    comparisons = []
    for a, b in pairs:
        difference, error = paired_difference(correct[a], correct[b])
        comparisons.append({"a": a, "b": b, "difference": difference, "standard_error": error, "n": len(labels)})
    return comparisons


def sentence(comparison: Mapping[str, Any]) -> str:
    """Return what a comparison allows to say, and no more."""
    a, b = (comparison[side].replace("randomly", "the randomly") for side in "ab")
    points, error = 100 * comparison["difference"], 100 * comparison["standard_error"]
    size = f"{points:+.1f} ± {error:.1f} points".replace("-", "−")
    if error == 0:
        return f"{a} and {b} are right on the same test images." if points == 0 else f"{a} minus {b}: {size}."
    ratio = abs(points) / error
    if ratio < STANDARD_ERRORS:
        return f"{a} and {b} cannot be told apart: {size}, {ratio:.1f} standard errors."
    word = "above" if points > 0 else "below"
    if a in RUNS and b in RUNS:
        return (
            f"{a} came out {word} {b} in this run: {size}, {ratio:.1f} standard errors over images. The spread between "
            "seeds is not in that error, so it ranks these two runs, not the methods."
        )
    return f"{a} is {word} {b}: {size}, {ratio:.1f} standard errors."
