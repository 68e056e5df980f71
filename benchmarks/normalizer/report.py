"""The tables of docs/numerics.md and the accuracy block of a docstring, made from the result files."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from benchmarks.marked_tables import filled
from benchmarks.normalizer.accuracy import DTYPES, OURS
from vmf_heads._expansion import expansion

DOCS = Path(__file__).parents[2] / "docs" / "numerics.md"
SOURCE = Path(__file__).parents[2] / "src" / "vmf_heads" / "special.py"
TRAINING_DIMENSIONS = (64, 256, 1024)
Rows = list[dict[str, Any]]


def update_docs() -> None:
    """Put the newest CPU results between the markers of docs/numerics.md and into the docstring that quotes them."""
    DOCS.write_text(rendered(DOCS.read_text()))
    SOURCE.write_text(with_accuracy(SOURCE.read_text()))


def with_accuracy(source: str) -> str:
    """`source` with the lines behind "Accuracy ...::" replaced by ours: largest and root-mean-square error in eps."""
    ours = [row for row in results.latest("normalizer_accuracy")["rows"] if row["method"] == OURS]
    lines = []
    for dtype in DTYPES:
        own = [row for row in ours if row["dtype"] == dtype]
        points = sum(row["points"] for row in own)
        cells = []
        for name, symbol in (("value", "D"), ("resultant", "A"), ("slope", "A'")):
            rms = math.sqrt(sum(row[f"{name}_rms"] ** 2 * row["points"] for row in own) / points)
            cells.append(f"{symbol} {max(row[f'{name}_max'] for row in own):.1f} / {rms:.1f}")
        failures = sum(row["non_finite"] for row in own)
        lines.append(f"        {dtype}   {'   '.join(cells)}   not finite: {failures} of {points}\n")
    block = re.compile(r"(    Accuracy, [^:]*::\n\n)((?:        .*\n)*)")
    return block.sub(lambda found: found[1] + "".join(lines), source)


def rendered(text: str) -> str:
    """`text` with every `<!-- table: NAME -->` ... `<!-- end -->` filled; KeyError for an unknown NAME."""
    accuracy, speed = results.latest("normalizer_accuracy"), results.latest("normalizer_speed")
    tables = {
        "regimes": regime_table(),
        "accuracy": own_table(accuracy["rows"]) + f"\n\n{_provenance(accuracy)}",
        "methods": method_table(accuracy["rows"]),
        "training": training_table(accuracy["rows"]),
        "speed": speed_table(speed["rows"]) + f"\n\n{_provenance(speed)}",
    }
    return filled(text, tables.__getitem__)


def own_table(rows: Rows) -> str:
    """Ours by dimension: largest and root-mean-square error in eps."""
    ours = [row for row in rows if row["method"] == OURS]
    body = []
    for p in dict.fromkeys(row["p"] for row in ours):
        cells = [str(p)]
        for dtype in DTYPES:
            row = next(row for row in ours if row["p"] == p and row["dtype"] == dtype)
            cells += [
                f"{row[f'{name}_max']:.1f} / {row[f'{name}_rms']:.2f}" for name in ("value", "resultant", "slope")
            ]
            cells.append(str(row["non_finite"]))
        body.append(cells)
    head = ["p", *(f"{dtype}: {name}" for dtype in DTYPES for name in ("D", "A", "A'", "not finite"))]
    return _table(head, body)


def method_table(rows: Rows) -> str:
    """Every method over all points it was given: failures, and points at which D or A is off by more than 4 eps."""
    keys = ("points", "non_finite", "value_above_4", "resultant_above_4")
    body = []
    for method, dtype, own in _by_method(rows):
        body.append([method, dtype, *(str(sum(row[key] for row in own)) for key in keys)])
    return _table(["method", "dtype", "points", "not finite", "D beyond 4 eps", "A beyond 4 eps"], body)


def training_table(rows: Rows) -> str:
    """Every method at the dimensions of prototype heads, kappa in [1, 1000]."""
    body = []
    for method, dtype, own in _by_method(rows):
        for row in own:
            if row["p"] in TRAINING_DIMENSIONS and row["training_points"]:
                lost = f"{row['training_non_finite']} of {row['training_points']}"
                errors = (row["training_value_nats"], row["training_resultant_relative"])
                body.append([method, dtype, str(row["p"]), lost, *("" if e is None else f"{e:.1e}" for e in errors)])
    head = ["method", "dtype", "p", "not finite", "D, largest error in nats", "A, largest relative error"]
    return _table(head, body)


def speed_table(rows: Rows) -> str:
    """Nanoseconds per element, one row per method and dtype."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    body = []
    for method, dtype, own in _by_method(rows):
        cells = {row["task"]: f"{row['ns_per_element']:,.1f}" for row in own}
        body.append([method, dtype, *(cells.get(task, "") for task in tasks)])
    return _table(["method", "dtype", *tasks], body)


def regime_table() -> str:
    """Which order and how many terms the value uses, by dimension, read off the implementation."""
    body = []
    for name, dtype in DTYPES.items():
        start, previous = 2, _regime(2, dtype)
        for p in range(3, 1202):
            current = _regime(p, dtype) if p <= 1200 else None
            if current != previous:
                dimensions = f"{start} to {p - 1}" if current else f"{start} and more"
                body.append([name, dimensions, *previous])
                start, previous = p, current
    return _table(["dtype", "p", "terms M", "steps down in order"], body)


def _regime(p: int, dtype: torch.dtype) -> tuple[str, str]:
    constants = expansion(p, dtype)
    terms = len(constants.W) // 3  # W has degree 3M - 1 in t
    lowest = math.floor(constants.N)
    return str(terms), f"from order {lowest} or {lowest}.5 down to p/2 - 1" if constants.steps else "none"


def _by_method(rows: Rows) -> Iterator[tuple[str, str, Rows]]:
    for method, dtype in sorted({(row["method"], row["dtype"]): None for row in rows}, key=_ours_first):
        yield method, dtype, [row for row in rows if (row["method"], row["dtype"]) == (method, dtype)]


def _ours_first(method_and_dtype: tuple[str, str]) -> tuple[str, bool]:
    return method_and_dtype[1], not method_and_dtype[0].startswith(OURS)


def _provenance(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
    return f"*{result['device']}, {result['threads']} thread, {result['date']}; {versions}.*"


def _table(head: list[str], body: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *body))
