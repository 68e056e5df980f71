"""`python -m benchmarks mixture`: which centre keeps prototypes in use and makes their norms concentrations."""

import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks import results
from benchmarks.mixture.arms import ARMS, Arm
from benchmarks.mixture.measures import measures
from benchmarks.mixture.problem import problem
from benchmarks.mixture.train import Settings, train

SEEDS = tuple(range(10, 15))
"""The settings were chosen with other seeds."""

Case = tuple[Arm, int, Settings]


def mixture(*, grid: Literal["readings", "stability"] = "readings", output: Path = Path("runs")) -> None:
    """Train every contender on mixtures of known truth; an interrupted command goes on where it stopped.

    Args:
        grid: "readings" compares all arms over p, K, the norms' learning rate and decay (half an hour on one core);
            "stability" looks for settings in which training goes wrong.
        output: folder of the rows so far, mixture_GRID.jsonl; the finished table goes to benchmarks/results/.
    """
    torch.set_num_threads(1)
    path = output / f"mixture_{grid}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {_key(row) for row in rows}
    for arm, p, settings in GRIDS[grid]():
        case = {"arm": arm.name, "p": p} | asdict(settings)
        if _key(case) in done:
            continue
        start = time.process_time()
        data = problem(p, list(SEEDS))
        run, losses = train(arm, settings, data, SEEDS[0])
        found = [case | {"seed": seed} | row for seed, row in zip(SEEDS, measures(run, losses, data), strict=True)]
        for row in found:
            row["cpu_seconds"] = (time.process_time() - start) / len(found)
        with path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in found)
        rows += found
        print(f"{arm.name:24} p {p:3}, K {settings.prototypes:2}, g {settings.norm_speed:4}: {_mean(found)}", flush=True)
    print(results.write(f"mixture_{grid}", "cpu", rows, seeds=list(SEEDS)))


def readings() -> Iterator[Case]:
    """All arms, p from 8 to 256, K below and above the 16 clusters, three speeds of the norms, with and without decay."""
    speeds = [(1.0, 0.0), (3.0, 0.0), (10.0, 0.0), (3.0, 0.1)]
    for prototypes, p, (speed, decay), arm in itertools.product((64, 8), (16, 8, 64, 256), speeds, ARMS):
        if arm.normalization != "l2" or speed == 1:  # norms that do not move have no speed
            yield arm, p, Settings(prototypes=prototypes, norm_speed=speed, norm_decay=decay)


def stability() -> Iterator[Case]:
    """One change at a time that invites trouble, at p = 16 and 256."""
    changes: list[dict[str, Any]] = [
        {"lr": 0.02},
        {"lr": 0.05},
        {"lr": 0.02, "norm_speed": 10.0},
        {"norm_speed": 30.0},
        {"norm_speed": 100.0},
        {"prototypes": 512},
        {"prototypes": 512, "norm_speed": 10.0},
        {"batch": 16},
        {"batch": 16, "norm_speed": 10.0},
        {"teacher_temp": 0.02},
        {"center_momentum": 0.99, "norm_speed": 10.0},
        {"steps": 6000, "norm_speed": 3.0},
    ]
    for change, p, arm in itertools.product(changes, (16, 256), ARMS):
        yield arm, p, Settings(**change)


GRIDS = {"readings": readings, "stability": stability}


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["arm"], row["p"], *(row[name] for name in asdict(Settings()))


def _mean(rows: list[dict[str, Any]]) -> str:
    parts = []
    for name in ("used_by_logits", "used_by_targets", "purity", "rank_correlation", "kappa_spread", "spike"):
        values = [row[name] for row in rows if row[name] is not None]
        parts.append(f"{name} {sum(values) / len(values):.2f}" if values else f"{name} -")
    return ", ".join(parts)
