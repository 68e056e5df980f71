"""`python -m benchmarks fashion`: Table 1 and Figure 2 of the paper in small, on Fashion-MNIST."""

import itertools
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch

from benchmarks import results
from benchmarks.fashion.data import Images, load
from benchmarks.fashion.evaluate import COSINES, evaluate, features, nearest_neighbours
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

BANK = 10_000
"""The queries are compared with the first 10 000 images of the training split."""


def fashion(
    *,
    arms: tuple[str, ...] = tuple(ARMS),
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4),
    data: Path | None = None,
    split: Literal["val", "test"] = "test",
    output: Path = Path("runs"),
) -> None:
    """Train every cell of Table 1 with both readings; an interrupted command goes on where it stopped.

    Args:
        arms: the cells.
        seeds: the cells take turns, so that an interrupted table is a complete one of fewer seeds.
        data: folder of the four files of Fashion-MNIST; without it Debian's package or the hub.
        split: whose images are the queries; settings were chosen on "val".
        output: folder of the rows so far, fashion_table.jsonl; the finished table goes to benchmarks/results/.
    """
    torch.set_num_threads(1)
    images = load(data)
    bank = Images(images["train"].x[:BANK], images["train"].labels[:BANK])
    path = output / "fashion_table.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(row["arm"], row["seed"], row["split"]) for row in rows}
    for seed, arm in itertools.product(seeds, arms):
        if (arm, seed, split) in done:
            continue
        start = time.process_time()
        settings = Settings(**ARMS[arm])
        trained = train(settings, images["train"], seed)
        found = evaluate(trained, bank, images[split])
        row = {"arm": arm, "seed": seed, "split": split} | asdict(settings) | found
        row["cpu_seconds"] = time.process_time() - start
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        rows.append(row)
        print(f"seed {seed}, {arm}: kNN {row['knn']:.4f}, by fifth {row['knn_by_fifth']}", flush=True)
    references = {
        "raw_pixels_knn": _raw_pixels(bank, images[split]),
        "untrained_knn": [_untrained(bank, images[split], seed) for seed in seeds],
    }
    print(results.write("fashion_table", "cpu", rows, bank=BANK, cosines=COSINES, **references))


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
