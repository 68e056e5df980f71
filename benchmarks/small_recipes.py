"""`python -m benchmarks small-recipes DATA`: the recipes for small images beside raw pixels, on a folder of images."""

import json
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

import pretrain
from benchmarks import results
from benchmarks.evidence.summary import select, table, text
from benchmarks.marked_tables import filled
from config.recipe import load_recipe
from evaluate import evaluate
from evaluators.request import ExtractOptions, Request, Weights
from reporting.rows import read_results
from seeds import SHARED

DOCS = Path(__file__).parents[1] / "docs" / "examples.md"
RECIPES = {
    "small28": (
        "small28_dino_vmf_quick",
        "small28_dino_quick",
        "small28_dino_vmf",
        "small28_msn_vmf",
        "small28_ibot_vmf",
    ),
    "small32": ("small32_dino_vmf", "small32_dino", "small32_msn_vmf", "small32_ibot_vmf"),
    "small64": ("small64_dino_vmf", "small64_dino", "small64_msn_vmf", "small64_ibot_vmf"),
}
"""By the table of docs/examples.md that they are in; its result file has the same name."""
PROTOCOLS = ("knn", "linear")


def small_recipes(
    data: Annotated[Path, tyro.conf.Positional],
    *,
    size: Literal["small28", "small32", "small64"] = "small28",
    recipes: tuple[str, ...] = (),
    seeds: tuple[int, ...] = (0, 1, 2),
    split: Literal["val", "test"] = "test",
    output: Path = Path("runs/small"),
) -> None:
    """Pretrain every recipe with every seed, evaluate, and put the table into docs/examples.md.

    Interrupted, it goes on where it stopped.

    Args:
        data: folder of images with the splits train, val and test, such as `python -m benchmarks fashion-folder` makes
            for small28; docs/examples.md has the commands for the other two.
        size: which of the tables.
        recipes: what to train; all recipes of the table by default.
        seeds: what is trained where it is missing. The table has all seeds that `output` has.
        split: whose images are classified; settings were chosen on "val".
        output: folder of the runs, and of the rows so far, small_recipes.jsonl; the finished table goes to
            benchmarks/results/.
    """
    torch.set_num_threads(1)
    recipes = recipes or RECIPES[size]
    path = output / "small_recipes.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(row["recipe"], row["seed"], row["split"]) for row in rows}
    for seed in seeds:
        for recipe in recipes:
            if (recipe, seed, split) not in done:
                run = _run(output, recipe, seed)
                cpu_seconds = _pretrain(recipe, seed, data, run)
                row = {"recipe": recipe, "seed": seed, "split": split, "cpu_seconds": cpu_seconds}
                row |= _last_step(run) | _accuracies(run, data, "teacher", split)
                with path.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                rows.append(row)
    rows = [row for row in rows if row["split"] == split and row["recipe"] in recipes]
    rows.sort(key=lambda row: (row["seed"], recipes.index(row["recipe"])))
    untrained: dict[tuple[Any, ...], dict[str, float]] = {}  # recipes with the same network have it in common
    for row in rows:
        network = (row["seed"], *(getattr(load_recipe(row["recipe"]), field) for field in SHARED))
        if network not in untrained:
            untrained[network] = _accuracies(_run(output, row["recipe"], row["seed"]), data, "random", split)
        row["untrained"] = untrained[network]
    pixels = _accuracies(_run(output, recipes[0], seeds[0]), data, "pixels", split)
    print(results.write(size, "cpu", rows, data=data.name, raw_pixels=pixels))
    DOCS.write_text(rendered(DOCS.read_text()))


def rendered(page: str) -> str:
    """`page` with the tables of the newest results between their markers."""
    return filled(page, lambda name: _table(results.latest(name)))


def _run(output: Path, recipe: str, seed: int) -> Path:
    return output / f"{Path(recipe).stem}-seed{seed}"


def _pretrain(recipe: str, seed: int, data: Path, run: Path) -> float | None:
    """CPU time of the pretraining; None where an interrupted one was continued, or a finished one is there."""
    if (run / "backbone").exists():
        return None
    start, resume = time.process_time(), (run / "checkpoint.pt").exists()
    pretrain.main(pretrain.Options(recipe, run, data=data, seed=seed, resume=resume, num_workers=0))
    return None if resume else round(time.process_time() - start, 1)


def _last_step(run: Path) -> dict[str, Any]:
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    return {name: last[name] for name in ("step", "loss", "prototypes_used", "kappa_p05", "kappa_p95")}


def _accuracies(run: Path, data: Path, features: Weights, split: Literal["val", "test"]) -> dict[str, float]:
    """Top-1 accuracies by protocol; evaluated where they are missing."""
    found = {}
    for protocol in PROTOCOLS:
        wanted = (protocol, features, split, "top1")
        rows = [
            row
            for row in read_results(run)
            if (row["protocol"], row["features"], row["split"], row["metric"]) == wanted
        ]
        if not rows:
            options = ExtractOptions(num_workers=0)
            rows = evaluate(Request(str(run), features, split, data, extract=options), protocol)
        found[protocol] = rows[-1]["value"]
    return found


def _table(result: dict[str, Any]) -> str:
    pixels, rows = result["raw_pixels"], result["rows"]
    lines = [["raw pixels", "", "", *(cell for name in PROTOCOLS for cell in (f"{100 * pixels[name]:.2f}", "", ""))]]
    for recipe in dict.fromkeys(row["recipe"] for row in rows):
        own = select(rows, recipe=recipe)
        known = [row["cpu_seconds"] / 60 for row in own if row["cpu_seconds"] is not None]
        cells = [recipe, str(len(own)), f"{sum(known) / len(known):.1f}" if known else "–"]
        for name in PROTOCOLS:
            cells.append(text([row[name] for row in own], scale=100))
            cells.append(text([row[name] - pixels[name] for row in own], scale=100, signed=True))
            cells.append(text([row[name] - row["untrained"][name] for row in own], scale=100, signed=True))
        lines.append(cells)
    differences = ("minus raw pixels", "minus untrained")
    header = ("", "seeds", "CPU minutes", "kNN, %", *differences, "linear, %", *differences)
    where = f"{result['device']}, 1 thread, torch {result['versions']['torch']}, {result['date']}"
    return f"{table(header, lines)}\n\n({where}; `benchmarks/results`, `python -m benchmarks small-recipes`.)"
