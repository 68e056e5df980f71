"""Repeat a comparison of recipes over several seeds: the spread that one run cannot show.

    python examples/vit_ssl/seeds.py --output runs/seeds
    python examples/vit_ssl/seeds.py --output runs/seeds --recipes photos_ibot photos_ibot_vmf
    python examples/vit_ssl/seeds.py --output runs/seeds --recipes small28_dino_vmf_quick small28_msn_vmf --data IMAGES

pretrains each recipe with each seed (two runs at a time, one thread each), evaluates them and the network before its
first step on the test split, and prints a Markdown table with paired differences. Interrupted, the same command goes on
where it stopped.
"""

from __future__ import annotations

from runtime.ending import sound_ending

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import tyro

from config.cards import METHODS
from config.recipe import Recipe, load_recipe
from data.images import load_images
from reporting.demo_table import ACCURACIES, RUNS, is_evaluated, paired_difference, read_rows
from runtime.lanes import Job, run_lanes

SCRIPTS = Path(__file__).parent
RANDOM = "randomly initialised network"
# What two recipes must share so that one untrained network is the baseline of both.
SHARED = ("dataset", "image_size", "backbone", "patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
SHARED += ("feature_grid", "initializer_range")


def main(
    output: Path = Path("runs/seeds"),
    recipes: tuple[str, ...] = tuple(RUNS.values()),
    seeds: tuple[int, ...] = (0, 1, 2),
    data: Path | None = None,
    max_steps: int | None = None,
    parallel: int = 2,
    debug: bool = False,
) -> None:
    """Pretrain and evaluate every seed, then print the table.

    Args:
        output: directory of the runs.
        recipes: what to compare: recipes of the same data and backbone.
        seeds: at least two, fixed before looking at any result.
        data: folder of images with the splits train, val and test, for recipes whose `dataset` is a folder.
        max_steps: stop each pretraining after this many steps, to try the whole path in less time.
        parallel: runs at a time.
        debug: show the traceback of an error.
    """
    if len(set(seeds)) < 2:
        raise ValueError(f"`seeds` (={seeds}) must be at least two different numbers")
    if parallel < 1:
        raise ValueError(f"`parallel` (={parallel}) must be at least 1")
    models = labelled(recipes, data)
    runs = [jobs(output, models, label, seed, data, max_steps) for seed in seeds for label in models]
    lanes = {f"lane {i + 1}": [job for run in runs[i::parallel] for job in run] for i in range(parallel)}
    run_lanes(lanes)
    print(report(output, models, seeds, data))


def labelled(names: Sequence[str], data: Path | None = None) -> dict[str, Recipe]:
    """Return the recipes by what the table calls them.

    Raises ValueError unless they are different ones, of the same data and backbone, with `data` if they need it.
    """
    recipes = [load_recipe(name) for name in names]
    labels = [METHODS[r.method] + ("-vMF" if r.normalization == "vmf" else "") for r in recipes]
    if not recipes or len(set(names)) < len(names):
        raise ValueError(f"`recipes` (={tuple(names)}) must be different ones, at least one")
    for field in SHARED:
        if len({getattr(recipe, field) for recipe in recipes}) > 1:
            values = ", ".join(f"{recipe.name} {getattr(recipe, field)}" for recipe in recipes)
            raise ValueError(f"`recipes` must have the same `{field}`, for one untrained network beside them: {values}")
    dataset = recipes[0].dataset
    if dataset not in ("photos", "digits", "folder"):
        raise ValueError(f"`recipes` (={tuple(names)}) must have `dataset` photos, digits or folder, not {dataset}")
    if (dataset == "folder") != (data is not None):
        given = None if data is None else str(data)
        raise ValueError(
            f"`data` (={given}) must be a folder of images for recipes with `dataset` folder, and for no others"
        )
    # Recipes of one method and normalisation are told apart by their names.
    return dict(zip(labels if len(set(labels)) == len(labels) else names, recipes, strict=True))


def jobs(
    output: Path, models: Mapping[str, Recipe], label: str, seed: int, data: Path | None, max_steps: int | None
) -> list[Job]:
    """Return what is left to do for one recipe and seed; the first recipe's run has the untrained network, too."""
    recipe, todo = models[label].name, []
    directory = run_directory(output, recipe, seed)
    log = directory.with_suffix(".log")
    if not (directory / "backbone").exists():
        command = [sys.executable, str(SCRIPTS / "pretrain.py"), "--recipe", recipe, "--output", str(directory)]
        command += ["--seed", str(seed)]
        command += [] if data is None else ["--data", str(data)]
        command += [] if max_steps is None else ["--max-steps", str(max_steps)]
        command += ["--resume"] if (directory / "checkpoint.pt").exists() else []
        todo.append(Job(f"{label}, seed {seed}: pretraining", command, log))
    for features in ("random", "teacher") if label == next(iter(models)) else ("teacher",):
        if not is_evaluated(directory, features):
            command = [sys.executable, str(SCRIPTS / "evaluate.py"), "all", "--checkpoint", str(directory)]
            command += ["--features", features, "--split", "test"]
            todo.append(Job(f"{label}, seed {seed}: evaluating {features}", command, log))
    return todo


def run_directory(output: Path, recipe: str, seed: int) -> Path:
    """Return where one run lives."""
    return output / f"{recipe}-seed{seed}"


def report(output: Path, models: Mapping[str, Recipe], seeds: Sequence[int], data: Path | None = None) -> str:
    """Return every seed's accuracies as a Markdown table, then the paired kNN differences."""
    first = next(iter(models.values()))
    rows = {RANDOM: (first.name, "random")} | {label: (recipe.name, "teacher") for label, recipe in models.items()}
    header = ["", *ACCURACIES, "used by scores", "used by targets"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for label, (recipe, features) in rows.items():
        found = [accuracies(run_directory(output, recipe, seed), features) for seed in seeds]
        cells = [" ".join(f"{100 * row[column]:.1f}" for row in found) for column in ACCURACIES]
        used = [" ".join(str(row.get(name, "–")) for row in found) for name in ("used_scores", "used_targets")]
        lines.append(f"| {label} | {' | '.join(cells + used)} |")
    labels = load_images(first.dataset, "test", data=data).labels
    correct = {
        label: np.stack([knn_correct(run_directory(output, recipe, seed), features, labels) for seed in seeds])
        for label, (recipe, features) in rows.items()
    }
    pairs = [(label, RANDOM) for label in models]
    pairs += [
        (label, label.removesuffix("-vMF")) for label in models if label.removesuffix("-vMF") in models.keys() - {label}
    ]
    return "\n".join([*lines, "", *(compare(a, b, correct[a], correct[b]) for a, b in pairs)])


def accuracies(directory: Path, features: str) -> dict[str, float]:
    """Return the table's numbers of one run."""
    rows = {
        (row["protocol"], row["metric"]): row["value"]
        for row in read_rows(directory / "results.jsonl")
        if row["features"] == features and row["split"] in ("test", "train")
    }
    used = {name: rows["prototypes", name] for name in ("used_scores", "used_targets") if ("prototypes", name) in rows}
    return {column: rows[key] for column, key in ACCURACIES.items()} | used


def knn_correct(directory: Path, features: str, labels: np.ndarray) -> np.ndarray:
    """Return which test images kNN gets right (N,)."""
    return np.load(directory / "predictions" / f"knn-{features}-test.npy") == labels


def compare(a: str, b: str, correct_a: np.ndarray, correct_b: np.ndarray) -> str:
    """Return one line on the difference of two models (S, N): its mean over seeds with both of its standard errors."""
    mean, over_images = paired_difference(correct_a.mean(axis=0), correct_b.mean(axis=0))
    by_seed = correct_a.mean(axis=1) - correct_b.mean(axis=1)
    over_seeds = by_seed.std(ddof=1) / math.sqrt(len(by_seed))
    seeds = ", ".join(f"{100 * value:+.1f}" for value in by_seed)
    return (
        f"kNN, {a} minus {b}: {100 * mean:+.1f} points ({seeds}); paired standard error "
        f"{100 * over_images:.1f} over test images, {100 * over_seeds:.1f} over seeds."
    )


if __name__ == "__main__":
    with sound_ending():
        tyro.cli(main)
