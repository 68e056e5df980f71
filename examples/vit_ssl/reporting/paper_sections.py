"""What the evaluation page shows, as text: the paper's tables with our numbers beside them, and what is beyond them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from evaluators.ood.scores import IN_WORDS
from reporting.paper_rows import HOW, SOURCES, Row, Source, data_name, find, is_imagenet
from reporting.paper_tables import ABLATION, FEW_SHOT, IMAGENET, TRANSFER, UTILISATION, Number, PaperTable

OOD_MEASURES = {"auroc": "AUROC", "fpr95": "FPR95"}
OOD_NOTE = (
    "How well each score tells the evaluated images from others. AUROC is the probability that an image of the data "
    "has the higher score: 100 is perfect, 50 is chance. FPR95 is the share of the images of the data that are "
    "rejected when 95 % of the others are: 0 is perfect (both as in OpenOOD). Difficulty is the rank correlation, from "
    "−1 to 1, of the score with whether kNN is right. All scores were fitted to train images alone."
)


class Section(NamedTuple):
    """A table of the page, without the looks."""

    title: str
    head: list[str]
    rows: list[list[str]]
    notes: list[str]
    paper: list[list[str]]  # the paper's whole table, its head first; empty where it has none


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
    notes = _notes(table, rows, found, bool(of_paper), left_out)
    return Section(f"Table {table.number}. {table.title}", head, lines, notes, whole)


def _notes(
    table: PaperTable, rows: Sequence[Row], found: Mapping[str, Row | None], matched: bool, left_out: Mapping[str, str]
) -> list[str]:
    notes = []
    missing = [column for column, row in found.items() if row is None]
    if missing:
        which = "Nothing was measured" if len(missing) == len(found) else f"Not measured: {', '.join(missing)}"
        reasons = {left_out[name] for column in missing if (name := SOURCES[table.number][column].protocol) in left_out}
        notes.append(". ".join([which, *sorted(reasons), f"To fill it: {HOW[table.number]}"]) + ".")
    k = find(rows, Source("prototypes", "prototypes"))
    if table is UTILISATION and k and k["value"] != 65_536:
        notes.append(f"Not comparable: the paper's models have 65536 prototypes, this one {k['value']}.")
    if not matched and len(missing) < len(found):
        notes.append("The paper has no row for this checkpoint, or none is known: --paper-row names one.")
    elsewhere = {measured_on(row) for row in found.values() if row and not is_imagenet(row)}
    if table in (ABLATION, IMAGENET, FEW_SHOT) and elsewhere:
        notes.append(
            f"Not comparable: the paper's numbers are on ImageNet, these on {' and '.join(sorted(elsewhere))}."
        )
    return notes


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


def ood_sections(rows: Sequence[Row]) -> list[Section]:
    """Return the table of out-of-distribution scores of the last evaluated data and split; none without such rows."""
    found = [row for row in rows if row["protocol"] == "ood" and row.get("features", "teacher") == "teacher"]
    if not found:
        return []
    where = measured_on(found[-1])
    last = {row["metric"]: row for row in found if measured_on(row) == where}
    values = {metric: row["value"] for metric, row in last.items()}
    of_score = {row["score"]: row for row in last.values()}
    sets = {row["out"]: row["kind"] for row in last.values() if "out" in row}
    lines = []
    for score, row in of_score.items():
        cells = [
            number(100 * values[metric] if (metric := f"{measure}_{score}@{name}") in values else None, None, 1)
            for name in sets
            for measure in OOD_MEASURES
        ]
        correlation = values.get(f"difficulty_{score}")
        settings = ", ".join(f"{key} {row[key]:g}" for key in ("k", "components", "C") if key in row)
        lines.append([IN_WORDS[score], *cells, "–" if correlation is None else f"{correlation:+.2f}", settings])
    titles = [f"{title}, {_named(name, kind)}" for name, kind in sets.items() for title in OOD_MEASURES.values()]
    head = ["", *titles, "difficulty", "chosen"]
    return [Section("Out of distribution", head, lines, [OOD_NOTE, f"Measured on {where}."], [])]


def _named(name: str, kind: str) -> str:
    if name == kind:
        return f"mean of {kind} sets"
    return name if kind == "out" else f"{name} ({kind})"
