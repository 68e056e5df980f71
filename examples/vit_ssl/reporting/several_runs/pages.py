"""The table of several runs in Markdown, and their figures by file name."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean, stdev
from typing import Any

import numpy as np

from reporting.several_runs import charts
from reporting.several_runs.numbers import Row


def table(rows: Sequence[Row], baseline: str) -> str:
    """Return a line for every setting in Markdown: means over its seeds with their standard errors.

    The differences of kNN to `baseline` are paired by seed.
    """
    head = ("", "seeds", "kNN, %", f"minus {baseline}, points", "used: scores", "logits", "targets", "κ₉₅ / κ₅")
    lines = [head, ("---",) * len(head)]
    reference = {row["seed"]: row["knn"] for row in rows if row["name"] == baseline}
    for name in names(rows):
        own = [row for row in rows if row["name"] == name]
        paired = [100 * (row["knn"] - reference[row["seed"]]) for row in own if row["seed"] in reference]
        used = [_text([row[f"used_{kind}"] for row in own]) for kind in ("scores", "logits", "targets")]
        spread = _text([row["kappa"]["p95"] / row["kappa"]["p05"] for row in own])
        difference = "" if name == baseline else _text(paired, sign="+")
        lines.append((name, str(len(own)), _text([100 * row["knn"] for row in own]), difference, *used, spread))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def figures(rows: Sequence[Row]) -> dict[str, str]:
    """Return the figures as SVG by file name; without Figure 2 where no setting has kappa that differ."""
    found = {"figures_6_7.svg": duplicates(rows), "use_over_time.svg": over_time(rows)}
    return found | ({"figure_2.svg": figure_2(rows)} if any(row["by_kappa"] for row in rows) else {})


def figure_2(rows: Sequence[Row]) -> str:
    """Draw kNN by percentiles of kappa; settings whose kappa are all equal are left out."""
    ranges = sorted({name for row in rows for name in row["by_kappa"]}, key=lambda name: float(name.split("-")[0]))
    divided = [row for row in rows if row["by_kappa"]]
    series = _series(divided, lambda row: [row["by_kappa"].get(name, math.nan) for name in ranges])
    return charts.figure_2(series, [f"{name} %" for name in ranges])


def duplicates(rows: Sequence[Row]) -> str:
    """Draw Figures 6 and 7."""
    unique, largest = (_series(rows, lambda row, kind=kind: row[kind]) for kind in ("unique", "largest_set"))
    return charts.duplicates(rows[0]["cosines"], unique, largest)


def over_time(rows: Sequence[Row]) -> str:
    """Draw use of the prototypes and spread of kappa against the epoch."""
    used = _series(rows, lambda row: row["over_time"]["prototypes_used"])
    spread = _series(rows, lambda row: np.divide(*(row["over_time"][name] for name in ("kappa_p95", "kappa_p05"))))
    panels = {"Different prototypes among a step's targets": used, "κ: 95 % quantile over 5 % quantile": spread}
    return charts.over_time(panels, time="epoch")


def names(rows: Sequence[Row]) -> list[str]:
    """Return the settings in the order of the rows."""
    return list(dict.fromkeys(row["name"] for row in rows))


def _series(rows: Sequence[Row], values: Callable[[Row], Any]) -> dict[str, np.ndarray]:
    # A run that has been cut short has fewer epochs than others.
    found = {name: [np.asarray(values(row), float) for row in rows if row["name"] == name] for name in names(rows)}
    longest = max(len(row) for own in found.values() for row in own)
    return {
        name: np.stack([np.pad(row, (0, longest - len(row)), constant_values=np.nan) for row in own])
        for name, own in found.items()
    }


def _text(values: Sequence[float], sign: str = "") -> str:
    if not values:
        return "–"
    error = f" ± {stdev(values) / math.sqrt(len(values)):.2f}" if len(values) > 1 else ""
    return f"{fmean(values):{sign}.2f}".replace("-", "−") + error
