"""`python -m benchmarks distinct`: a regulariser and online EM beside prototypes that learn, on the photographs."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pretrain
from benchmarks import results
from evaluate import evaluate
from evaluators.request import Request, make_features
from training.run import Run, load_run
from vmf_heads.head import find_head
from vmf_heads.mixture import CompressedMixture, VMFMixture, compress_mixture

RECIPE = "photos_dino_vmf"
EM = "online_em={{mlp: {}, rows_per_prototype: 50, max_kappa: 1000, median_kappa: 10}}"
ARMS: dict[str, tuple[str, ...]] = {
    "learnt, as in the recipe": (),
    "learnt, KoLeo 0.1": ("prototype_koleo_weight=0.1",),
    "learnt, KoLeo 1": ("prototype_koleo_weight=1",),
    "online EM, random MLP": (EM.format("keep"),),
    "online EM, isometric MLP": (EM.format("isometric"),),
}
"""What differs from the recipe."""
LENGTHS = {4: ("epochs=4", "warmup_epochs=1", "teacher_temp_warmup_epochs=2"), 16: ()}
"""What makes a run of so many epochs; 16 are the recipe's."""
BOUNDS = (0.01, 0.05)
"""Of the total variation that `compress_mixture` may change the targets by."""


def distinct(
    *,
    seeds: tuple[int, ...] = (0, 1, 2),
    epochs: tuple[int, ...] = tuple(LENGTHS),
    arms: tuple[str, ...] = tuple(ARMS),
    output: Path = Path("runs/distinct"),
) -> None:
    """Pretrain photos_dino_vmf with each arm, count its prototypes, and compress its teacher's head.

    An interrupted command goes on where it stopped. Writes benchmarks/results/distinct_cpu_*.json, the table of
    docs/mixture.md and its picture, from all rows so far.

    Args:
        seeds: of the runs.
        epochs: lengths of the runs, keys of LENGTHS.
        arms: names of ARMS.
        output: folder of the runs, and of the rows so far, distinct.jsonl.
    """
    from benchmarks.distinct.report import draw
    from benchmarks.mixture_docs import update_docs  # it imports the tables of all benchmarks of that page

    torch.set_num_threads(1)
    output.mkdir(parents=True, exist_ok=True)
    path = output / "distinct.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for seed in seeds:
        for length in epochs:
            for arm in arms:
                wanted = {"epochs": length, "arm": arm, "seed": seed}
                if not any(wanted.items() <= row.items() for row in rows):
                    rows.append(wanted | measured(pretrained(output, length, arm, seed)))
                    with path.open("a") as file:
                        file.write(json.dumps(rows[-1]) + "\n")
                    print(rows[-1], flush=True)
    rows.sort(key=lambda row: (row["epochs"], list(ARMS).index(row["arm"]), row["seed"]))
    print(results.write("distinct", "cpu", rows))
    draw(rows)
    update_docs()


def pretrained(output: Path, epochs: int, arm: str, seed: int) -> Path:
    """The run of this arm; what was interrupted goes on."""
    run = output / f"{epochs}-{list(ARMS).index(arm)}-seed{seed}"
    if not (run / "backbone").exists():
        began, resume = time.process_time(), (run / "checkpoint.pt").exists()
        overrides = (*LENGTHS[epochs], *ARMS[arm])
        pretrain.main(pretrain.Options(RECIPE, run, seed=seed, overrides=overrides, resume=resume))
        print(f"{run}: {time.process_time() - began:.0f} CPU seconds")
    return run


def measured(run: Path) -> dict[str, Any]:
    """What is counted of a run's prototypes, kNN of its backbone, and its head compressed."""
    request = Request(str(run), split="test")
    found = {row["metric"]: row["value"] for row in evaluate(request, "prototypes")}
    names = ("used_logits", "used_targets", "kappa_p05", "kappa_p50", "kappa_p95", "void", "mean_length")
    names += ("target_entropy", "marginal_entropy")
    rows: dict[str, Any] = {name: found[name] for name in names}
    rows["unique"] = {name.partition("@")[2] or "0.9": found[name] for name in found if name.startswith("unique")}
    rows["knn"] = evaluate(request, "knn")[-1]["value"]
    return rows | {"compressed": compressed(load_run(run))}


def compressed(run: Run) -> dict[str, dict[str, float]]:
    """By the bound: the prototypes that are left, and how much the targets of train images and of others change."""
    head, tau = find_head(run.method.teacher), run.recipe.teacher_temp
    features = make_features(run)
    train, fresh = (head.features(torch.from_numpy(features(name).x)) for name in ("train", "test"))
    mixture = VMFMixture.from_head(head, tau)
    centre = run.method.loss.centering.offset(tau)
    targets = VMFMixture((-centre).softmax(0), mixture.directions, mixture.kappa)  # responsibilities of Eq. 7
    found = {}
    for bound in BOUNDS:
        fewer = compress_mixture(targets, train, bound)
        found[str(bound)] = {
            "prototypes": fewer.mixture.num_components,
            "total_variation": fewer.total_variation,
            "total_variation_fresh": changed(targets, fewer, fresh),
        }
    return found


def changed(old: VMFMixture, fewer: CompressedMixture, y: Tensor) -> float:
    """The total variation between the old targets, summed over each group, and the new ones: a mean over rows y."""
    targets, group = old.responsibilities(y), fewer.component
    kept = torch.zeros(len(y), fewer.mixture.num_components).index_add(1, group[group >= 0], targets[:, group >= 0])
    difference = (kept - fewer.mixture.responsibilities(y)).abs().sum(1) + targets[:, group < 0].sum(1)
    return difference.mean().item() / 2
