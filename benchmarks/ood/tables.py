"""The table of docs/mixture.md on densities as scores."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from benchmarks.ood.images import NEAR
from evaluators.ood.scores import IN_WORDS


def table(result: dict[str, Any]) -> str:
    """A table for each kind of data: AUROC by set in per cent, FPR95 in brackets, and difficulty, over the seeds."""
    tables = []
    for inside in NEAR:
        rows = [row for row in result["rows"] if row["inside"] == inside]
        if rows:
            tables.append(_table(inside, rows))
    return "\n\n".join(tables)


def _table(inside: str, rows: list[dict[str, Any]]) -> str:
    sets = list(rows[0]["images"])
    names = [f"{name} (near)" if name == NEAR[inside] else name for name in sets]
    seeds = len({row["seed"] for row in rows})
    lines = [f"**Pretrained on {inside}**, {seeds} seeds:", ""]
    lines += [f"| network | score | {' | '.join(names)} | difficulty |", "|" + " --- |" * (3 + len(sets))]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = [row for row in rows if row["arm"] == arm]
        for score in own[0]["scores"]:
            found = [row["scores"][score] for row in own]
            cells = [
                f"{_mean([one['auroc'][name] for one in found])} ({_mean([one['fpr95'][name] for one in found], 0)})"
                for name in sets
            ]
            difficulty = [one["difficulty"] for one in found if one["difficulty"] is not None]
            cells.append(_mean(difficulty, 2, scale=1, sign="+") if difficulty else "–")
            lines.append(f"| {arm} | {IN_WORDS[score]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(values: Iterable[float], digits: int = 1, *, scale: float = 100, sign: str = "") -> str:
    """Mean and standard deviation over seeds; by default in per cent."""
    numbers = scale * np.array(list(values))
    spread = f" ± {numbers.std(ddof=1):.{digits}f}" if len(numbers) > 1 else ""
    return f"{numbers.mean():{sign}.{digits}f}{spread}"
