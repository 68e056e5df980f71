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
from evaluate import evaluate
from evaluators.request import ExtractOptions, Request, Weights
from reporting.rows import read_results

DOCS = Path(__file__).parents[1] / "docs" / "examples.md"
RECIPES = ("small28_dino_vmf_quick", "small28_dino_quick", "small28_dino_vmf")
"""They have the same network, so that one network before training is the baseline of all."""
PROTOCOLS = ("knn", "linear")


def small_recipes(
    data: Annotated[Path, tyro.conf.Positional],
    *,
    recipes: tuple[str, ...] = RECIPES,
    seeds: tuple[int, ...] = (0, 1, 2),
    split: Literal["val", "test"] = "test",
    output: Path = Path("runs/small"),
) -> None:
    """Pretrain every recipe with every seed, evaluate, and put the table into docs/examples.md.

    Interrupted, it goes on where it stopped.

    Args:
        data: folder of images with the splits train, val and test, such as `python -m benchmarks fashion-folder` makes.
        recipes: what to train.
        seeds: the recipes take turns, so that an interrupted table is a complete one of fewer seeds.
        split: whose images are classified; settings were chosen on "val".
        output: folder of the runs, and of the rows so far, small_recipes.jsonl; the finished table goes to
            benchmarks/results/.
    """
    torch.set_num_threads(1)
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
    rows = [
        row for row in rows if (row["split"], row["seed"] in seeds, row["recipe"] in recipes) == (split, True, True)
    ]
    first = [_run(output, recipes[0], seed) for seed in seeds]
    pixels = _accuracies(first[0], data, "pixels", split)
    untrained = [_accuracies(run, data, "random", split) for run in first]
    print(results.write("small_recipes", "cpu", rows, data=data.name, raw_pixels=pixels, untrained=untrained))
    DOCS.write_text(rendered(DOCS.read_text()))


def rendered(page: str) -> str:
    """`page` with the table of the newest results between its markers."""
    return filled(page, lambda name: _table(results.latest(name)) if name == "small_recipes" else None)


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
    pixels, untrained, rows = result["raw_pixels"], result["untrained"], result["rows"]

    def line(name: str, found: list[dict[str, Any]], minutes: str) -> list[str]:
        cells = [name, str(len(found)), minutes]
        for protocol in PROTOCOLS:
            own = [row[protocol] for row in found]
            cells += [text(own, scale=100), text([x - pixels[protocol] for x in own], scale=100, signed=True)]
        return cells

    lines = [["raw pixels", "", "", f"{100 * pixels['knn']:.2f}", "", f"{100 * pixels['linear']:.2f}", ""]]
    lines.append(line("before training", untrained, ""))
    for recipe in dict.fromkeys(row["recipe"] for row in rows):
        own = select(rows, recipe=recipe)
        known = [row["cpu_seconds"] / 60 for row in own if row["cpu_seconds"] is not None]
        minutes = f"{sum(known) / len(known):.1f}" if known else "–"
        lines.append(line(recipe, own, minutes))
    header = ("", "seeds", "CPU minutes", "kNN, %", "minus raw pixels", "linear, %", "minus raw pixels")
    where = f"{result['device']}, 1 thread, torch {result['versions']['torch']}, {result['date']}"
    return f"{table(header, lines)}\n\n({where}; `benchmarks/results`, `python -m benchmarks small-recipes`.)"
