"""The tables of docs/loss.md and the headline of the README, made from the result file."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.loss import contenders
from benchmarks.loss.measure import STARTS
from benchmarks.marked_tables import filled

DOCS = Path(__file__).parents[2] / "docs" / "loss.md"
Rows = list[dict[str, Any]]


def update_docs() -> None:
    """Replace what stands between the markers of docs/loss.md by tables of the newest CPU results."""
    DOCS.write_text(rendered(DOCS.read_text()))


def rendered(text: str) -> str:
    """`text` with every `<!-- table: NAME -->` ... `<!-- end -->` filled; KeyError for an unknown NAME."""
    result = results.latest("loss")
    versions = ", ".join(
        f"{name} {version}" for name, version in (result["versions"] | result.get("peers", {})).items()
    )
    provenance = f"*{result['device']}, {result['threads']} threads, {result['date']}; {versions}.*"
    tables = {
        "ratios": f"{ratio_table(result['rows'])}\n\n{provenance}",
        "lost": lost(result["rows"]),
        "work": work_table(result["rows"]),
        "costs": size_tables(result["rows"]),
    }
    return filled(text, tables.__getitem__)


def headline() -> str:
    """What the README and docs/loss.md say first: the range of both ratios over the sizes with DINO's K."""
    pairs = [
        tuple(own[contenders.FUSED][key] / own[contenders.PLAIN][key] for key in ("step_s", "extra_bytes"))
        for size, own in _from_parameters(results.latest("loss")["rows"])
        if size.endswith("K = 65,536")
    ]
    time, memory = zip(*pairs, strict=True)
    return (
        f"{min(time):.2f} to {max(time):.2f} of the time and {min(memory):.2f} to {max(memory):.2f} of the extra memory"
    )


def ratio_table(rows: Rows) -> str:
    """The fused loss beside plain DINO and beside its own products, one line per size, from the head's parameters."""
    lines = [
        "| crops × images, K | time, to plain DINO's | both under torch.compile | extra memory, to plain DINO's "
        "| time, to its products' |",
        "|" + " --- |" * 5,
    ]
    for size, own in _from_parameters(rows):
        fused, plain = own[contenders.FUSED], own[contenders.PLAIN]
        compiled = _ratio(own.get(contenders.FUSED_COMPILED, {}), own.get(contenders.COMPILED, {}), "step_s")
        memory, floor = _ratio(fused, plain, "extra_bytes"), _ratio(fused, own[contenders.PRODUCTS], "step_s")
        lines.append(f"| {size} | {_ratio(fused, plain, 'step_s')} | {compiled} | {memory} | {floor} |")
    return "\n".join(lines)


def lost(rows: Rows) -> str:
    """How often another loss was faster than the fused one, and which was the fastest there, in words.

    First each loss as its user would take it, with torch.compile or without, then all of them without.
    """
    cases = [{row["contender"]: row for row in own if "step_s" in row} for own in _cases(rows)]
    cases = [own for own in cases if {contenders.COMPILED, contenders.FUSED} <= own.keys()]  # not the brief ones
    any_form = _lost(cases, {contenders.FUSED, contenders.FUSED_COMPILED}, {contenders.PRODUCTS})
    compiled = {contenders.COMPILED, contenders.FUSED_COMPILED}
    without = _lost(cases, {contenders.FUSED}, {contenders.PRODUCTS, *compiled})
    return f"Rows lost: {any_form}. Where no loss is compiled: {without}."


def _lost(cases: list[dict[str, dict[str, Any]]], ours: set[str], without: set[str]) -> str:
    """In how many cases the fastest of `ours` takes longer than the fastest of all others but those `without`."""

    def fastest(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return min(rows, key=lambda row: float(row["step_s"]))

    named = []
    for own in cases:
        mine = fastest([row for name, row in own.items() if name in ours])
        other = fastest([row for name, row in own.items() if name not in ours | without])
        if mine["step_s"] > other["step_s"]:
            ratio = f"{mine['step_s'] / other['step_s']:.2f} × {other['contender']}"
            named.append(f"{mine['size']}, {mine['start']}: {ratio}")
    return f"{len(named)} of {len(cases)}" + (f" ({'; '.join(named)})" if named else "")


def work_table(rows: Rows) -> str:
    """What the losses compute and move, for each size from the head's parameters."""
    lines = [
        "| crops × images, K | loss | 10⁹ multiplications in products | GiB moved | ms |",
        "|" + " --- |" * 5,
    ]
    for own in _cases(rows):
        for row in own:
            if row["start"] == STARTS[True] and "moved_bytes" in row:
                work = f"{row['multiplications'] / 1e9:.1f} | {row['moved_bytes'] / 2**30:.1f}"
                lines.append(f"| {row['size']} | {row['contender']} | {work} | {1e3 * row['step_s']:.0f} |")
    return "\n".join(lines)


def _cases(rows: Rows) -> Iterator[Rows]:
    """What was measured at a size and from a start, for each of these."""
    for size in dict.fromkeys(row["size"] for row in rows):
        for start in STARTS.values():
            own = [row for row in rows if row["size"] == size and row["start"] == start]
            if own:
                yield own


def _from_parameters(rows: Rows) -> Iterator[tuple[str, dict[str, dict[str, Any]]]]:
    """(size, rows by contender) for each size, from the head's parameters."""
    for size in dict.fromkeys(row["size"] for row in rows):
        own = [row for row in rows if row["size"] == size and row["start"] == STARTS[True]]
        yield size, {row["contender"]: row for row in own}


def size_tables(rows: Rows, *, digits: int = 0) -> str:
    """One table per size and start that was measured, with so many digits of a millisecond."""
    return "\n\n".join(f"**{own[0]['size']}**, {own[0]['start']}\n\n{_table(own, digits)}" for own in _cases(rows))


def _table(rows: Rows, digits: int) -> str:
    plain, floor = (
        next((row for row in rows if row["contender"] == name), {}) for name in (contenders.PLAIN, contenders.PRODUCTS)
    )
    lines = [
        "| | forward, ms | and backward, ms | to plain | to the products | extra memory, MiB | to plain |",
        "|" + " --- |" * 7,
    ]
    for row in rows:
        if "missing" in row:
            continue
        forward = f"{1e3 * row['forward_s']:.{digits}f}" if "forward_s" in row else ""
        ratios = " | ".join(_ratio(row, other, "step_s") for other in (plain, floor))
        memory = f"{row['extra_bytes'] / 2**20:.0f}" if "extra_bytes" in row else ""
        memory += f" | {_ratio(row, plain, 'extra_bytes')}"
        lines.append(f"| {row['contender']} | {forward} | {1e3 * row['step_s']:.{digits}f} | {ratios} | {memory} |")
    absent = [f"{row['contender']}: {row['missing']}" for row in rows if "missing" in row]
    return "\n".join(lines) + (f"\n\nNot measured: {'; '.join(absent)}." if absent else "")


def _ratio(row: dict[str, Any], other: dict[str, Any], key: str) -> str:
    """Nothing where either was not measured."""
    return f"{row[key] / other[key]:.2f}" if key in row and key in other else ""
