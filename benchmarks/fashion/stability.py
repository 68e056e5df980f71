"""`python -m benchmarks fashion-stability`: does plain DINO become unstable with an encoder, where vMF does not?"""

import itertools
import json
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from benchmarks.fashion.data import Images, load
from benchmarks.fashion.evaluate import COSINES, evaluate
from benchmarks.fashion.run import ARMS, BANK
from benchmarks.fashion.train import Settings, Trained, train
from benchmarks.mixture.measures import spike

COMPARED = ("none, logit", "vMF, responsibilities", "vMF, scores")
CHANGES: tuple[dict[str, Any], ...] = (
    {},
    {"norm_speed": 100.0},
    {"lr": 0.02, "clip": 0.0},
    {"lr": 0.05, "clip": 0.0},
    {"lr": 0.02, "clip": 0.0, "norm_speed": 100.0},
    {"head_layers": 6, "clip": 0.0},
    {"batch": 16},
    {"batch": 16, "lr": 0.02, "clip": 0.0},
    {"prototypes": 4096},
    {"precision": "bfloat16", "clip": 0.0},
)
"""What invites trouble: the settings of Table 1 with these changes, written down before any of them was run."""
STEPS = 300
"""Half as many as in Table 1, because there are many settings."""


def fashion_stability(
    *,
    seeds: tuple[int, ...] = (0, 1, 2),
    changes: tuple[int, ...] = tuple(range(len(CHANGES))),
    data: Path | None = None,
    output: Path = Path("runs"),
) -> None:
    """Train plain DINO and DINO-vMF under settings that invite trouble; interrupted, it goes on where it stopped.

    Args:
        seeds: they take turns, so that an interrupted table is a complete one of fewer seeds.
        changes: indices of the changes in benchmarks/fashion/stability.py.
        data: folder of the four files of Fashion-MNIST; without it Debian's package or the hub.
        output: folder of the rows so far, fashion_stability.jsonl; the finished table goes to benchmarks/results/.
    """
    torch.set_num_threads(1)
    images = load(data)
    bank = Images(images["train"].x[:BANK], images["train"].labels[:BANK])
    path = output / "fashion_stability.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {_key(row) for row in rows}
    for seed, change, arm in itertools.product(seeds, changes, COMPARED):
        settings = Settings(**ARMS[arm], **CHANGES[change], steps=STEPS)
        row: dict[str, Any] = json.loads(json.dumps({"arm": arm, "seed": seed} | asdict(settings)))
        if _key(row) in done:
            continue
        start = time.process_time()
        trained = train(settings, images["train"], seed)
        row |= quietness(trained)
        if row["finite"]:
            row |= evaluate(trained, bank, images["test"])
        row["cpu_seconds"] = time.process_time() - start
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        rows.append(row)
        shown = ("finite", "spike", "largest_norm", "used_by_logits", "marginal_entropy", "knn")
        print(f"seed {seed}, {CHANGES[change]}, {arm}:", {name: row.get(name) for name in shown}, flush=True)
    print(results.write("fashion_stability", "cpu", rows, bank=BANK, cosines=COSINES))


def quietness(trained: Trained) -> dict[str, Any]:
    """Whether all losses were finite; the largest rise of the loss, the largest norms of a gradient and a prototype."""
    finite = all(map(math.isfinite, trained.losses))
    return {
        "finite": finite,
        "steps_done": len(trained.losses),
        "spike": spike(torch.tensor(trained.losses)) if finite else None,
        "largest_gradient": max(filter(math.isfinite, trained.gradients), default=None),
        "largest_norm": max(filter(math.isfinite, trained.largest_norm), default=None),
    }


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    names = ("arm", "seed", *(name for name in asdict(Settings()) if not isinstance(row[name], list)))
    return tuple(row[name] for name in names)
