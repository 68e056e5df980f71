"""Means over seeds with their standard errors, as text."""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

Rows = list[dict[str, Any]]


def mean_and_error(values: Iterable[float | None]) -> tuple[float, float] | None:
    """Mean and its standard error; None without values. Seeds of which a measure is not defined are left out."""
    found = [value for value in values if value is not None]
    if not found:
        return None
    error = statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else math.nan
    return statistics.fmean(found), error


def text(values: Iterable[float | None], *, digits: int = 2, scale: float = 1.0, signed: bool = False) -> str:
    """Mean and standard error as "m±e"; a dash where the measure is not defined."""
    found = mean_and_error(None if value is None else scale * value for value in values)
    if found is None:
        return "–"
    mean, error = (f"{x:{'+' if signed and not i else ''}.{digits}f}" for i, x in enumerate(found))
    mean = mean.replace("-", "−")
    return mean if error == "nan" else f"{mean}±{error}"


def select(rows: Rows, **wanted: Any) -> Rows:
    """The rows that have these values."""
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
