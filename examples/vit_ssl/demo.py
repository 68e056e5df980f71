"""Pretrain a small ViT with DINO and with DINO-vMF on photographs, evaluate both, write a report.

    python examples/vit_ssl/demo.py --output runs/demo

takes a few minutes on two CPU cores. Ctrl-C stops it, and the same command continues where it stopped.
"""

from __future__ import annotations

from runtime.ending import sound_ending

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import tyro

from config.recipe import Recipe, load_recipe
from data.images import load_images
from reporting.demo.story import story
from reporting.demo_table import (
    MODELS,
    RUNS,
    compare_knn,
    format_table,
    is_evaluated,
    make_table,
    read_rows,
    sentence,
)
from runtime.lanes import Job, last_row, run_lanes
from storage.lock import locked
from storage.whole_file import whole_file

SCRIPTS = Path(__file__).parent


def main(
    output: Path = Path("runs/demo"), max_steps: int | None = None, redraw: bool = False, debug: bool = False
) -> None:
    """Pretrain, evaluate on the test split, print one table, write results.json and report.html.

    Args:
        output: directory of the demo; one that was interrupted is continued, a finished one is left as it is.
        max_steps: stop each pretraining after this many steps, to try the whole path in less time.
        redraw: draw the report of a finished demo again.
        debug: show the traceback of an error.
    """
    began = time.monotonic()
    if max_steps is not None and max_steps < 1:
        raise ValueError(f"`max_steps` (={max_steps}) must be at least 1")
    if redraw:
        if not (output / "results.json").exists():
            raise FileNotFoundError(f"`output` (={str(output)!r}) must be the directory of a finished demo")
        draw(output, json.loads((output / "results.json").read_text()))
        announce(output)
        return
    recipes = {run: load_recipe(run) for run in RUNS.values()}
    claim(output, recipes, max_steps)
    if (output / "results.json").exists():
        print(f"{output} holds a finished demo (choose another --output to run it again):\n")
        announce(output)
        return

    with locked(output):
        compare(output, recipes, max_steps, began)
    announce(output)


def compare(output: Path, recipes: dict[str, Recipe], max_steps: int | None, began: float) -> None:
    """Do what is left to do of the demo in `output`."""
    lanes = {label: jobs(output, run, recipes[run], max_steps) for label, run in RUNS.items()}
    print(f"Two runs side by side, one thread each; their output goes to {output}/*/log.txt", flush=True)
    try:
        run_lanes(lanes)
    except SystemExit:
        print(f"Stopped. The same command continues it: python {' '.join(sys.argv)}", file=sys.stderr)
        raise

    results = collect(output, recipes, max_steps)
    draw(output, results)
    results["seconds"] = round(time.monotonic() - began, 1)
    # This comes last, and in one step: a demo is finished when results.json is there.
    with whole_file(output / "results.json") as file:
        file.write(json.dumps(results, indent=1).encode())


def claim(output: Path, recipes: dict[str, Recipe], max_steps: int | None) -> None:
    """Make `output` the directory of this very demo, or raise FileExistsError saying what it is instead."""
    request = {
        "recipes": {name: dataclasses.asdict(recipe) for name, recipe in recipes.items()},
        "max_steps": max_steps,
    }
    request = json.loads(json.dumps(request))  # tuples become lists, as they will when read back
    path = output / "demo.json"
    if not path.exists():
        if output.exists() and any(output.iterdir()):
            raise FileExistsError(f"`output` (={str(output)!r}) is not empty and holds no demo: choose another")
        output.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            file.write(json.dumps(request, indent=1).encode())
        return
    found = json.loads(path.read_text())
    if found["max_steps"] != max_steps:
        there = "all steps" if found["max_steps"] is None else f"--max-steps {found['max_steps']}"
        raise FileExistsError(
            f"`output` (={str(output)!r}) holds a demo of {there}: give the same, or another --output"
        )
    if found != request:
        raise FileExistsError(f"`output` (={str(output)!r}) holds a demo of other recipes: choose another")


def jobs(output: Path, run: str, recipe: Recipe, max_steps: int | None) -> list[Job]:
    """Return what is left to do for one run: its pretraining, then the evaluations whose rows live in its directory."""
    directory = output / run
    log = directory / "log.txt"
    steps = recipe.epochs * (len(load_images(recipe.dataset, "train")) // recipe.batch_size)
    steps = min(steps, max_steps or steps)
    todo = []
    if not (directory / "backbone").exists():  # exported when the last step is done
        command = [sys.executable, str(SCRIPTS / "pretrain.py"), "--recipe", run, "--output", str(directory)]
        command += ["--max-steps", str(steps)]
        command += ["--resume"] if (directory / "checkpoint.pt").exists() else []
        todo.append(Job("pretraining", command, log, directory / "metrics.jsonl", steps))
    for features in [features for where, features in MODELS.values() if where == run]:
        if not is_evaluated(directory, features):
            command = [sys.executable, str(SCRIPTS / "evaluate.py"), "all", "--checkpoint", str(directory)]
            todo.append(Job(f"evaluating {features}", [*command, "--features", features, "--split", "test"], log))
    return todo


def collect(output: Path, recipes: dict[str, Recipe], max_steps: int | None) -> dict[str, Any]:
    """Return everything the demo found and what it was found with."""
    labels = load_images("photos", "test").labels
    packages = ("vmf_heads", "torch", "transformers", "scikit-learn", "scikit-image", "numpy")
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "system": f"{platform.system()} {platform.machine()}",
            "threads_per_run": 1,
        },
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in packages},
        "max_steps": max_steps,
        "recipes": {name: dataclasses.asdict(recipe) for name, recipe in recipes.items()},
        "steps": {run: last_row(output / run / "metrics.jsonl")["step"] for run in recipes},
        "table": make_table(output),
        "knn_comparisons": compare_knn(output, labels),
        "evaluations": {run: read_rows(output / run / "results.jsonl") for run in recipes},
    }


def draw(output: Path, results: dict[str, Any]) -> None:
    """Write OUTPUT/report.html."""
    from reporting.demo.report import write_report  # imported here because transformers takes seconds to import

    print("Drawing the report", flush=True)
    with (output / "log.txt").open("w") as log, contextlib.redirect_stderr(log):  # progress bars of a second or two
        write_report(output, results)


def cpu_name() -> str:
    """Return the processor's name, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def announce(output: Path) -> None:
    """Print the table, what it allows to say and where the report is."""
    results = json.loads((output / "results.json").read_text())
    print(format_table(results["table"]))
    print(
        "\nPer cent on the test split; ±: standard error over images, for 1- and 5-shot deviation over training sets."
    )
    said = story(results)
    lines = [said["use"], said["kappa"], said["by_kappa"], *map(sentence, results["knn_comparisons"])]
    print("\n".join(f"- {line}" for line in lines))
    print(f"\n{results['seconds']:.0f} s in all. Report: {output / 'report.html'}; numbers: {output / 'results.json'}")


if __name__ == "__main__":
    with sound_ending():
        tyro.cli(main)
