"""`python -m benchmarks ood`: scores of photographs and of clothing beside other images, over several seeds."""

import itertools
import json
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from benchmarks.fashion.data import load
from benchmarks.fashion.train import Settings
from benchmarks.ood import figures
from benchmarks.ood.images import CLOTHING, NEAR, PHOTOGRAPHS
from benchmarks.ood.networks import PLAIN, UNTRAINED, VMF, Seen, clothing_networks, photograph_networks
from evaluators.knn import predict
from evaluators.ood.measures import rank_correlation, separation
from evaluators.ood.ood import NEIGHBOURS
from evaluators.ood.scores import fit_scores

ARMS = (VMF, PLAIN, UNTRAINED)


def ood(
    *,
    seeds: tuple[int, ...] = (0, 1, 2),
    inside: tuple[str, ...] = (PHOTOGRAPHS, CLOTHING),
    runs: Path = Path("runs/ablation"),
    data: Path | None = None,
    output: Path = Path("runs"),
) -> None:
    """Score what networks were pretrained on beside other images; an interrupted command goes on where it stopped.

    Writes benchmarks/results/ood_cpu_*.json, the table of docs/mixture.md and its picture. On the photographs the
    networks are those of `ablation.py --recipe photos_dino_vmf`; on Fashion-MNIST they are trained here, a minute each.

    Args:
        seeds: they take turns, so that an interrupted table is a complete one of fewer seeds.
        inside: the data that networks were pretrained on.
        runs: output directory of the ablation.
        data: folder of the four files of Fashion-MNIST; without it Debian's package or the hub.
        output: folder of the rows so far, ood.jsonl.
    """
    from benchmarks.mixture_docs import update_docs  # it imports the tables of all benchmarks of that page

    torch.set_num_threads(1)
    if unknown := set(inside) - set(NEAR):
        raise ValueError(f"`inside` (={inside}) must be of {', '.join(NEAR)}, which {', '.join(unknown)} is not")
    clothing = load(data)
    path = output / "ood.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(row["inside"], row["arm"], row["seed"]) for row in rows}
    for seed, name, arm in itertools.product(seeds, inside, ARMS):
        if (name, arm, seed) in done:
            continue
        start = time.process_time()
        if name == PHOTOGRAPHS:
            seen = photograph_networks(runs, arm, seed, clothing)
        else:
            seen = clothing_networks(Settings, arm, seed, clothing)
        row = {"inside": name, "arm": arm, "seed": seed} | measure(seen)
        row["cpu_seconds"] = round(time.process_time() - start, 1)
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        rows.append(row)
        shown = {score: {where: round(value, 3) for where, value in found["auroc"].items()}
                 for score, found in row["scores"].items()}  # fmt: skip
        print(f"seed {seed}, {name}, {arm}, {row['cpu_seconds']} s: {shown}", flush=True)
    print(results.write("ood", "cpu", rows))
    figures.draw(rows)
    update_docs()


def measure(seen: Seen) -> dict[str, Any]:
    """kNN accuracy, and of every score: AUROC and FPR95 by set, difficulty, and the settings that were chosen."""
    scores = fit_scores(seen.train, seen.own)
    right = predict(seen.train, seen.test, (NEIGHBOURS,))[NEIGHBOURS] == seen.test.labels
    inside, outside = scores(seen.test.x), {name: scores(x) for name, x in seen.outside.items()}
    found: dict[str, Any] = {}
    for score, values in inside.items():
        apart = {name: separation(values, others[score]) for name, others in outside.items()}
        found[score] = {
            "auroc": {name: round(one.auroc, 5) for name, one in apart.items()},
            "fpr95": {name: round(one.fpr95, 5) for name, one in apart.items()},
            "difficulty": rank_correlation(values, right),
            "chosen": {key: value for key, value in scores.notes.get(score, {}).items() if not isinstance(value, dict)},
        }
    return {"knn": float(right.mean()), "images": {name: len(x) for name, x in seen.outside.items()}, "scores": found}
