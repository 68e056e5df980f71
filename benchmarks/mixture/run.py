"""`python -m benchmarks mixture`: which centre keeps prototypes in use and makes their norms concentrations."""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from benchmarks.mixture.grids import GRIDS, Case, GridName
from benchmarks.mixture.measures import measures
from benchmarks.mixture.problem import problem
from benchmarks.mixture.train import Settings, train

SEEDS = tuple(range(10, 15))
"""The settings were chosen with other seeds."""


def mixture(*, grid: GridName = "readings", output: Path = Path("runs")) -> None:
    """Train every contender on mixtures of known truth; an interrupted command goes on where it stopped.

    Args:
        grid: "readings" compares all arms over p, K, the learning rate and the decay of the norms; "overlap" does so
            on clusters that overlap at every p; "norms" asks what moves kappa; "stability" invites trouble.
        output: folder of the rows so far, mixture_GRID.jsonl; the finished table goes to benchmarks/results/.
    """
    torch.set_num_threads(1)
    path = output / f"mixture_{grid}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {_key(row) for row in rows}
    for case in GRIDS[grid]():
        if _key(_fields(case)) in done:
            continue
        found = _measured(case)
        with path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in found)
        rows += found
        print(f"{case.arm.name:24} p {case.p:3}, K {case.settings.prototypes:3}: {_mean(found)}", flush=True)
    print(results.write(f"mixture_{grid}", "cpu", rows, seeds=list(SEEDS)))


def _measured(case: Case) -> list[dict[str, Any]]:
    start = time.process_time()
    data = problem(case.p, list(SEEDS), kind=case.kind)
    run, losses = train(case.arm, case.settings, data, SEEDS[0])
    found = measures(run, losses, data)
    seconds = (time.process_time() - start) / len(SEEDS)
    return [
        _fields(case) | {"seed": seed, "oracle_purity": float(oracle)} | row | {"cpu_seconds": seconds}
        for seed, oracle, row in zip(SEEDS, data.oracle_purity(), found, strict=True)
    ]


def _fields(case: Case) -> dict[str, Any]:
    return {"arm": case.arm.name, "p": case.p, "kind": case.kind} | asdict(case.settings)


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["arm"], row["p"], row["kind"], *(row[name] for name in asdict(Settings()))


def _mean(rows: list[dict[str, Any]]) -> str:
    parts = []
    for name in ("used_by_logits", "used_by_targets", "purity", "rank_correlation", "kappa_spread", "spike"):
        values = [row[name] for row in rows if row[name] is not None]
        parts.append(f"{name} {sum(values) / len(values):.2f}" if values else f"{name} -")
    return ", ".join(parts)
