"""Evaluate the frozen backbone of a run: python examples/vit_ssl/evaluate.py PROTOCOL --checkpoint DIR."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from datetime import datetime, timezone
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro

from augment import EvalTransform
from backbone import cls_token
from checkpoint import Run, load_run, random_backbone
from data import load_images
from evaluators.features import Evaluator, Features, FeaturesOf, extract
from evaluators.fewshot import fewshot
from evaluators.knn import knn
from evaluators.linear import linear
from evaluators.prototypes import prototypes

CLASSIFIERS: dict[str, Evaluator] = {"knn": knn, "linear": linear, "fewshot": fewshot}


def evaluate(
    protocol: tyro.conf.Positional[Literal["knn", "linear", "fewshot", "prototypes", "all"]],
    /,
    checkpoint: Path,
    features: Literal["teacher", "random", "pixels"] = "teacher",
    split: Literal["val", "test"] = "val",
    data: Path | None = None,
) -> list[dict[str, Any]]:
    """Run a protocol; append its numbers to CHECKPOINT/results.jsonl, print them as a table and return them.

    Args:
        protocol: knn, linear, fewshot and prototypes, or all that the features allow.
        checkpoint: output directory of pretrain.py.
        features: the run's teacher, the same backbone before its first step, or raw pixels.
        split: what is reported; settings (k, C) are chosen on val in either case.
        data: folder of images to use in place of the run's own data set.
    """
    if protocol == "prototypes" and features != "teacher":
        raise ValueError(f"`features` (={features!r}) must be 'teacher' for the protocol 'prototypes'")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    run = load_run(checkpoint, device)
    features_of = make_features(run, features, data, device)
    rows = []
    for name in [*CLASSIFIERS, "prototypes"] if protocol == "all" else [protocol]:
        if name == "prototypes" and features != "teacher":
            continue  # pixels and random backbones have no prototypes
        rows += run_protocol(name, run, features_of, features, split, checkpoint)
    print_table(rows)
    return rows


def make_features(
    run: Run, features: Literal["teacher", "random", "pixels"], data: Path | None = None, device: str = "cpu"
) -> FeaturesOf:
    """A function from split to features that extracts each split once."""
    if features == "pixels":
        encode = partial(torch.flatten, start_dim=1)
    else:
        backbone = run.backbone if features == "teacher" else random_backbone(run.recipe, device)
        encode = partial(cls_token, backbone)
    dataset = "folder" if data else run.recipe.dataset
    transform = EvalTransform(run.recipe.image_size, keep=224 / 256 if dataset == "folder" else 1.0)

    @cache
    def features_of(split: str) -> Features:
        images = load_images(dataset, split, data=data)
        return extract(encode, images, transform, device=device, num_workers=run.recipe.num_workers)

    return features_of


def run_protocol(
    protocol: str, run: Run, features_of: FeaturesOf, features: str, split: str, directory: Path
) -> list[dict[str, Any]]:
    """One protocol's rows, appended to DIRECTORY/results.jsonl; predictions go to DIRECTORY/predictions/*.npy."""
    if protocol == "prototypes":
        split = "train"
    n = len(features_of(split).labels)  # extracted before the clock starts
    start = time.perf_counter()
    metrics = list(prototypes(run, features_of) if split == "train" else CLASSIFIERS[protocol](features_of, split))
    seconds = round(time.perf_counter() - start, 3)
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    rows = []
    for metric in metrics:
        row = {"protocol": protocol, "features": features, "split": split, "metric": metric.name, "value": metric.value}
        rows.append({**row, "n": n, "seconds": seconds, "date": date, **metric.options})
        if metric.predictions is not None:
            folder = directory / "predictions"
            folder.mkdir(exist_ok=True)
            np.save(folder / f"{protocol}-{features}-{split}.npy", metric.predictions)
    with (directory / "results.jsonl").open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def print_table(rows: Iterable[dict[str, Any]]) -> None:
    """One line per metric, with the settings behind it."""
    print(f"{'protocol':<11} {'features':<9} {'split':<6} {'metric':<13} {'value':>9}")
    for row in rows:
        value = f"{row['value']:9d}" if isinstance(row["value"], int) else f"{row['value']:9.3f}"
        notes = ", ".join(f"{key} {row[key]:.3g}" for key in ("k", "C", "sd", "draws", "cosine") if key in row)
        line = f"{row['protocol']:<11} {row['features']:<9} {row['split']:<6} {row['metric']:<13} {value}  {notes}"
        print(line.rstrip())


if __name__ == "__main__":
    tyro.cli(evaluate)
