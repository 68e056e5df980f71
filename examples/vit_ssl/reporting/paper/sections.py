"""The paper's tables with our numbers beside them, as text: what the evaluation page shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from reporting.paper.rows import HOW, SOURCES, Row, Source, data_name, find, is_imagenet
from reporting.paper.tables import ABLATION, FEW_SHOT, IMAGENET, TRANSFER, UTILISATION, Number, PaperTable


class Section(NamedTuple):
    """A table of the page, without the looks."""

    title: str
    head: list[str]
    rows: list[list[str]]
    notes: list[str]
    paper: list[list[str]]  # the paper's whole table, its head first
    empty: bool = False  # nothing was measured
    comparable: bool = True  # on the data and with the size of model that the paper has


def section(table: PaperTable, rows: Sequence[Row], reference: str | None, left_out: Mapping[str, str]) -> Section:
    """Return one of the paper's tables with our numbers: a line for each of its columns."""
    found = {column: find(rows, source) for column, source in SOURCES[table.number].items()}
    if table is ABLATION and reference is None:
        found = dict.fromkeys(found)  # a kNN accuracy of another kind of run has no place in this table
    values = {column: SOURCES[table.number][column].scale * row["value"] for column, row in found.items() if row}
    if table is TRANSFER and len(values) == len(found):
        values["average"] = sum(values.values()) / len(values)
    of_paper = dict(zip(table.columns, table.rows.get(reference, ()), strict=False))
    deviations = dict(zip(table.columns, table.deviations.get(reference, ()), strict=False))
    lines = []
    for column in table.columns:
        row = found.get(column)
        ours = number(values.get(column), 100 * row["sd"] if row and "sd" in row else None, table.digits)
        lines.append(
            [column, ours, number(of_paper.get(column), deviations.get(column), table.digits), measured_on(row)]
        )
    head = ["", "this checkpoint", f"paper: {reference}" if of_paper else "paper", "measured on"]
    whole = [["", *table.columns]]
    for name, numbers in table.rows.items():
        spread = table.deviations.get(name, (None,) * len(numbers))
        whole.append([name, *(number(n, sd, table.digits) for n, sd in zip(numbers, spread, strict=True))])
    differs = _not_comparable(table, rows, found)
    notes = [*_notes(table, found, bool(of_paper), left_out), *([differs] if differs else [])]
    title, empty = f"Table {table.number}. {table.title}", not values
    return Section(title, head, lines, notes, whole, empty, not empty and not differs)


def _notes(table: PaperTable, found: Mapping[str, Row | None], matched: bool, left_out: Mapping[str, str]) -> list[str]:
    notes = []
    missing = [column for column, row in found.items() if row is None]
    if missing:
        which = "Nothing was measured" if len(missing) == len(found) else f"Not measured: {', '.join(missing)}"
        reasons = {left_out[name] for column in missing if (name := SOURCES[table.number][column].protocol) in left_out}
        notes.append(". ".join([which, *sorted(reasons), f"To fill it: {HOW[table.number]}"]) + ".")
    if not matched and len(missing) < len(found):
        notes.append("The paper has no row for this checkpoint, or none is known: --paper-row names one.")
    return notes


def _not_comparable(table: PaperTable, rows: Sequence[Row], found: Mapping[str, Row | None]) -> str:
    k = find(rows, Source("prototypes", "prototypes"))
    if table is UTILISATION and k and k["value"] != 65_536:
        return f"Not comparable: the paper's models have 65536 prototypes, this one {k['value']}."
    elsewhere = {measured_on(row) for row in found.values() if row and not is_imagenet(row)}
    if table in (ABLATION, IMAGENET, FEW_SHOT) and elsewhere:
        return f"Not comparable: the paper's numbers are on ImageNet, these on {' and '.join(sorted(elsewhere))}."
    return ""


def number(value: Number, deviation: Number, digits: int) -> str:
    """Return a number with its standard deviation, a dash for None."""
    if value is None:
        return "–"
    return f"{value:.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")


def measured_on(row: Row | None) -> str:
    """Return the data, the split and the number of images behind a row."""
    if row is None:
        return ""
    parts = (data_name(row), row["split"], f"n = {row['n']}" if row.get("n") else None)
    return ", ".join(str(part) for part in parts if part)


def all_numbers(rows: Sequence[Row]) -> list[list[str]]:
    """Return the last row of each kind as a table, its head first."""
    keys = ("protocol", "features", "metric", "split", "data")
    last = {tuple(str(row.get(key, "")) for key in keys): row for row in rows}
    lines = [["protocol", "features", "metric", "value", "measured on"]]
    lines += [[*key[:3], f"{row['value']:.5g}", measured_on(row)] for key, row in last.items()]
    return lines
