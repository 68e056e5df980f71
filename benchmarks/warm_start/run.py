"""`python -m benchmarks warm-start`: pretraining goes on from a backbone without its head."""

import itertools
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch

import pretrain
from benchmarks import results
from benchmarks.warm_start.measure import at_the_start, knn, over_time, use
from config.recipe import load_recipe, parse_overrides
from data.images import load_images
from methods.registry import build_method
from training.run import load_run
from training.warm_start import fit_head, start_from
from vmf_heads.head import find_head
from vmf_heads.hub import PretrainedHead

RANDOM, LEFT_OUT = "random", "the one that was left out"
ARMS: dict[str, dict[str, Any]] = {
    RANDOM: {},
    "fitted on the random MLP, κ at 1/τ": {"mlp": "keep"},
    "fitted after the isometric start, κ at 1/τ": {},
    "fitted after the isometric start, κ as fitted": {"median_kappa": None},
    LEFT_OUT: {},
}
"""Options of `fit_head`; what is not there is as `pretrain.py --warm-start-head` has it."""
SETS = {
    "photos": ("epochs=4", "warmup_epochs=1", "teacher_temp_warmup_epochs=2"),
    "digits": ("epochs=6", "warmup_epochs=1", "teacher_temp_warmup_epochs=2"),
}
"""The first pretraining: a quarter of the epochs of the recipe NAME_dino_vmf."""
GOES_ON = ("epochs=2", "warmup_epochs=1", "teacher_temp_warmup_epochs=1", "lr=2e-3")
"""The second pretraining: fewer epochs, and a quarter of the learning rate."""


def warm_start(*, seeds: tuple[int, ...] = (0, 1, 2), output: Path = Path("runs/warm_start")) -> None:
    """Pretrain, throw the head away, and go on with a random head and with heads fitted to the backbone.

    An interrupted command goes on where it stopped. Writes benchmarks/results/warm_start_cpu_*.json, the table of
    docs/mixture.md and its picture.

    Args:
        seeds: of the first pretraining; the second has other crops and another order.
        output: folder of the runs, and of the rows so far, warm_start.jsonl.
    """
    from benchmarks.mixture_docs import update_docs  # it imports the tables of all benchmarks of that page
    from benchmarks.warm_start.report import draw

    torch.set_num_threads(1)
    output.mkdir(parents=True, exist_ok=True)
    path = output / "warm_start.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(row["set"], row["seed"], row["arm"]) for row in rows}
    for name, seed, arm in itertools.product(SETS, seeds, ARMS):
        if (name, seed, arm) not in done:
            began = time.process_time()
            row = {"set": name, "seed": seed, "arm": arm} | measured(name, seed, arm, output)
            row["cpu_seconds"] = round(time.process_time() - began, 1)
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            rows.append(row)
            print({key: value for key, value in row.items() if not isinstance(value, list)}, flush=True)
    print(results.write("warm_start", "cpu", rows))
    draw(rows)
    update_docs()


def measured(name: str, seed: int, arm: str, output: Path) -> dict[str, Any]:
    """One pretraining that goes on: its start, its end, and the steps between."""
    first = pretrained(name, seed, output)
    recipe = load_recipe(f"{name}_dino_vmf", parse_overrides(GOES_ON) | {"seed": 1000 + seed})
    run = output / f"{name}-{seed}-{list(ARMS).index(arm)}"
    shutil.rmtree(run, ignore_errors=True)  # of a command that was interrupted
    head = run.with_name(f"{run.name}-head")
    found: dict[str, Any] = {"knn_before": knn(first)}

    method = build_method(recipe).train()
    if arm == LEFT_OUT:
        head = first / "heads" / "student"
    elif arm != RANDOM:
        start_from(method, str(first / "backbone"))
        fit = fit_head(method, load_images(name, "train"), output, num_workers=0, **ARMS[arm])
        found |= {"fitted_kappa": fit.mixture.kappa.median().item(), "nats": fit.log_likelihood}
        PretrainedHead(find_head(method.student), recipe.teacher_temp).save_pretrained(head)
    options: dict[str, Any] = {"init_backbone": str(first / "backbone")}
    if arm != RANDOM:
        options["init_head"] = str(head)
    start_from(method, options["init_backbone"], options.get("init_head"))
    found |= {f"{key}_before": value for key, value in use(method, name).items()}
    found |= at_the_start(method, load_images(name, "train"), output)

    # The seed is the recipe's own from here on: the random head is the one that was measured.
    overrides = (*GOES_ON, f"seed={recipe.seed}")
    pretrain.main(pretrain.Options(recipe.name, run, overrides=overrides, **options))
    found |= use(load_run(run).method, name)
    return found | {"knn": knn(run)} | over_time(run)


def pretrained(name: str, seed: int, output: Path) -> Path:
    """The run that the backbones come from; what was interrupted goes on."""
    run = output / f"{name}-{seed}"
    if not (run / "backbone").exists():
        resume = (run / "checkpoint.pt").exists()
        pretrain.main(pretrain.Options(f"{name}_dino_vmf", run, seed=seed, overrides=SETS[name], resume=resume))
    return run
