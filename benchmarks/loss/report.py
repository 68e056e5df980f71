"""The tables of docs/loss.md, made from the result file."""

from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.loss import contenders
from benchmarks.loss.measure import STARTS

DOCS = Path(__file__).parents[2] / "docs" / "loss.md"
Rows = list[dict[str, Any]]


def update_docs() -> None:
    """Replace what stands between the markers of docs/loss.md by tables of the newest CPU results."""
    DOCS.write_text(rendered(DOCS.read_text()))


def rendered(text: str) -> str:
    """`text` with what stands between `<!-- table: costs -->` and `<!-- end -->` made anew."""
    result = results.latest("loss")
    before, _, rest = text.partition("<!-- table: costs -->")
    versions = ", ".join(
        f"{name} {version}" for name, version in (result["versions"] | result.get("peers", {})).items()
    )
    provenance = f"*{result['device']}, {result['threads']} threads, {result['date']}; {versions}.*"
    table = f"{size_tables(result['rows'])}\n\n{provenance}"
    return f"{before}<!-- table: costs -->\n\n{table}\n\n<!-- end -->{rest.partition('<!-- end -->')[2]}"


def size_tables(rows: Rows) -> str:
    """One table per size and start that was measured."""
    tables = []
    for size in dict.fromkeys(row["size"] for row in rows):
        for start in STARTS.values():
            own = [row for row in rows if row["size"] == size and row["start"] == start]
            if own:
                tables.append(f"**{size}**, {start}\n\n{_table(own)}")
    return "\n\n".join(tables)


def _table(rows: Rows) -> str:
    plain = next(row for row in rows if row["contender"] == contenders.PLAIN)
    floor = next(row for row in rows if row["contender"] == contenders.PRODUCTS)
    lines = [
        "| | forward, ms | and backward, ms | to plain | to the products | extra memory, MiB | to plain |",
        "|" + " --- |" * 7,
    ]
    for row in rows:
        if "missing" in row:
            continue
        forward = f"{1e3 * row['forward_s']:.0f}" if "forward_s" in row else ""
        ratios = f"{row['step_s'] / plain['step_s']:.2f} | {row['step_s'] / floor['step_s']:.2f}"
        memory = " | "
        if "extra_bytes" in row:
            memory = f"{row['extra_bytes'] / 2**20:.0f} | {row['extra_bytes'] / plain['extra_bytes']:.2f}"
        lines.append(f"| {row['contender']} | {forward} | {1e3 * row['step_s']:.0f} | {ratios} | {memory} |")
    absent = [f"{row['contender']}: {row['missing']}" for row in rows if "missing" in row]
    return "\n".join(lines) + (f"\n\nNot measured: {'; '.join(absent)}." if absent else "")
