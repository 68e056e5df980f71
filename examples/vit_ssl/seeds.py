"""Repeat the demo's comparison over several seeds: the spread that one run cannot show.

    python examples/vit_ssl/seeds.py --output runs/seeds

pretrains photos_dino_vmf and photos_dino with each seed (two runs at a time, one thread each), evaluates them and the
network before its first step on the test split, and prints a Markdown table with paired differences. Interrupted, the
same command goes on where it stopped.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tyro

from data import load_images
from demo import SCRIPTS, evaluated
from lanes import Job, JobFailed, run_lanes
from results import ACCURACIES, RUNS, paired_difference, read_rows

MODELS = {"randomly initialised ViT": ("photos_dino_vmf", "random")} | {
    label: (recipe, "teacher") for label, recipe in RUNS.items()
}


def main(output: Path = Path("runs/seeds"), seeds: tuple[int, ...] = (0, 1, 2), max_steps: int | None = None) -> None:
    """Pretrain and evaluate every seed, then print the table.

    Args:
        output: directory of the runs.
        seeds: at least two, fixed before looking at any result.
        max_steps: stop each pretraining after this many steps, to try the whole path in less time.
    """
    if len(set(seeds)) < 2:
        raise ValueError(f"`seeds` (={seeds}) must be at least two different numbers")
    lanes = {label: jobs(output, recipe, seeds, max_steps) for label, recipe in RUNS.items()}
    try:
        run_lanes(lanes)
    except JobFailed as error:
        sys.exit(str(error))
    print(report(output, seeds))


def jobs(output: Path, recipe: str, seeds: Sequence[int], max_steps: int | None) -> list[Job]:
    """What is left to do for one recipe, seed by seed."""
    todo = []
    for seed in seeds:
        directory = run_directory(output, recipe, seed)
        log = directory.with_suffix(".log")
        if not (directory / "backbone").exists():
            command = [sys.executable, str(SCRIPTS / "pretrain.py"), "--recipe", recipe, "--output", str(directory)]
            command += ["--seed", str(seed)]
            command += [] if max_steps is None else ["--max-steps", str(max_steps)]
            command += ["--resume"] if (directory / "checkpoint.pt").exists() else []
            todo.append(Job(f"pretraining, seed {seed}", command, log))
        for features in [features for where, features in MODELS.values() if where == recipe]:
            if not evaluated(directory, features):
                command = [sys.executable, str(SCRIPTS / "evaluate.py"), "all", "--checkpoint", str(directory)]
                command += ["--features", features, "--split", "test"]
                todo.append(Job(f"evaluating {features}, seed {seed}", command, log))
    return todo


def run_directory(output: Path, recipe: str, seed: int) -> Path:
    """Where one run lives."""
    return output / f"{recipe}-seed{seed}"


def report(output: Path, seeds: Sequence[int]) -> str:
    """Every seed's accuracies as a Markdown table, then the paired kNN differences."""
    header = ["", *ACCURACIES, "used by scores", "used by targets"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for model, (recipe, features) in MODELS.items():
        rows = [accuracies(run_directory(output, recipe, seed), features) for seed in seeds]
        cells = [" ".join(f"{100 * row[column]:.1f}" for row in rows) for column in ACCURACIES]
        used = [" ".join(str(row.get(name, "–")) for row in rows) for name in ("used_scores", "used_targets")]
        lines.append(f"| {model} | {' | '.join(cells + used)} |")
    labels = load_images("photos", "test").labels
    correct = {
        model: np.stack([knn_correct(run_directory(output, recipe, seed), features, labels) for seed in seeds])
        for model, (recipe, features) in MODELS.items()
    }
    pairs = [(a, "randomly initialised ViT") for a in RUNS] + [("DINO-vMF", "DINO")]
    return "\n".join([*lines, "", *(compare(a, b, correct[a], correct[b]) for a, b in pairs)])


def accuracies(directory: Path, features: str) -> dict[str, float]:
    """The table's numbers of one run."""
    rows = {
        (row["protocol"], row["metric"]): row["value"]
        for row in read_rows(directory / "results.jsonl")
        if row["features"] == features and row["split"] in ("test", "train")
    }
    used = {name: rows["prototypes", name] for name in ("used_scores", "used_targets") if ("prototypes", name) in rows}
    return {column: rows[key] for column, key in ACCURACIES.items()} | used


def knn_correct(directory: Path, features: str, labels: np.ndarray) -> np.ndarray:
    """Which test images kNN gets right (N,)."""
    return np.load(directory / "predictions" / f"knn-{features}-test.npy") == labels


def compare(a: str, b: str, correct_a: np.ndarray, correct_b: np.ndarray) -> str:
    """One line on the difference of two models (S, N): its mean over seeds with both of its standard errors."""
    mean, over_images = paired_difference(correct_a.mean(axis=0), correct_b.mean(axis=0))
    by_seed = correct_a.mean(axis=1) - correct_b.mean(axis=1)
    over_seeds = by_seed.std(ddof=1) / math.sqrt(len(by_seed))
    seeds = ", ".join(f"{100 * value:+.1f}" for value in by_seed)
    return (
        f"kNN, {a} minus {b}: {100 * mean:+.1f} points ({seeds}); paired standard error "
        f"{100 * over_images:.1f} over test images, {100 * over_seeds:.1f} over seeds."
    )


if __name__ == "__main__":
    tyro.cli(main)
