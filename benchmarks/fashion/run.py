"""`python -m benchmarks fashion`: Table 1 and Figure 2 of the paper in small, on Fashion-MNIST."""

import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks import results
from benchmarks.fashion.data import Images, load
from benchmarks.fashion.evaluate import evaluate, features, nearest_neighbours
from benchmarks.fashion.train import Settings, train

ARMS = {
    "none, logit": {"normalization": "none", "centering": "logit"},
    "vMF, responsibilities": {"normalization": "vmf", "center_on": "responsibilities"},
    "vMF, scores": {"normalization": "vmf", "center_on": "scores"},
    "none, probability": {"normalization": "none"},
    "L2, logit": {"normalization": "l2", "centering": "logit"},
    "L2, probability": {"normalization": "l2"},
    "vMF, logit": {"normalization": "vmf", "centering": "logit"},
}
"""Without log C_p both readings of Eq. 9 are the same centre."""

TROUBLE: dict[str, dict[str, Any]] = {
    "lr 0.03": {"lr": 0.03},
    "norms x 100": {"norm_speed": 100.0},
    "batch 16": {"batch": 16},
    "K 2048": {"prototypes": 2048},
}
BANK = 10_000
"""Images with which the queries are compared: the first so many of the training split."""


def fashion(
    *,
    study: Literal["table", "stability"] = "table",
    arms: tuple[str, ...] = tuple(ARMS),
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4),
    data: Path | None = None,
    split: Literal["val", "test"] = "test",
    output: Path = Path("runs"),
) -> None:
    """Train every cell of Table 1 on Fashion-MNIST; an interrupted command goes on where it stopped.

    Args:
        study: "table" is Table 1 with both readings and Figure 2; "stability" invites trouble in four ways, one seed.
        arms: the cells.
        seeds: the cells take turns, so that an interrupted table is a complete one of fewer seeds.
        data: folder of the four files of Fashion-MNIST; without it Debian's package or the hub.
        split: whose images are the queries; settings were chosen on "val".
        output: folder of the rows so far, fashion_STUDY.jsonl; the finished table goes to benchmarks/results/.
    """
    torch.set_num_threads(1)
    images = load(data)
    bank = Images(images["train"].x[:BANK], images["train"].labels[:BANK])
    path = output / f"fashion_{study}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(row["arm"], row["change"], row["seed"], row["split"]) for row in rows}
    changes = {"": {}} if study == "table" else TROUBLE
    for seed in seeds if study == "table" else seeds[:1]:
        for change, options in changes.items():
            for arm in arms:
                if (arm, change, seed, split) in done:
                    continue
                settings = replace(Settings(**ARMS[arm]), **options)
                start = time.process_time()
                trained = train(settings, images["train"], seed)
                row = {"arm": arm, "change": change, "seed": seed, "split": split} | asdict(settings)
                row |= {"cpu_seconds": time.process_time() - start} | evaluate(trained, bank, images[split])
                with path.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                rows.append(row)
                print(f"seed {seed}, {change} {arm}: kNN {row['knn']:.4f}, by fifth {row['knn_by_fifth']}", flush=True)
    references = {
        "raw_pixels_knn": _raw_pixels(bank, images[split]),
        "untrained_knn": [_untrained(bank, images[split], seed) for seed in seeds],
    }
    print(results.write(f"fashion_{study}", "cpu", rows, bank=BANK, **references))


def _untrained(bank: Images, queries: Images, seed: int) -> float:
    """kNN with the features that the network of this seed starts from."""
    network = train(Settings(steps=0), bank, seed).teacher.eval().backbone
    found = nearest_neighbours(features(network, bank.x), bank.labels, features(network, queries.x))
    return float((found == queries.labels).float().mean())


def _raw_pixels(bank: Images, queries: Images) -> float:
    """kNN without any network, on the grey values from 0 to 1."""
    darkest = float(bank.x.min())
    found = nearest_neighbours((bank.x - darkest).flatten(1), bank.labels, (queries.x - darkest).flatten(1))
    return float((found == queries.labels).float().mean())
