"""The tables of docs/evidence.md."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.evidence import image_tables
from benchmarks.evidence.image_tables import by_fifth, pairs, table_1
from benchmarks.evidence.mixture_tables import kappa, other_problems, readings, stability, summary
from benchmarks.marked_tables import filled

DOCS = Path(__file__).parents[2] / "docs" / "evidence.md"
TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "summary": ("mixture_readings", summary),
    "readings": ("mixture_readings", readings),
    "overlap": ("mixture_overlap", other_problems),
    "apart": ("mixture_readings", other_problems),
    "kappa": ("mixture_norms", kappa),
    "stability": ("mixture_stability", stability),
    "table_1": ("fashion_table", table_1),
    "pairs": ("fashion_table", pairs),
    "by_fifth": ("fashion_table", by_fifth),
    "photos": ("photos_table", table_1),
    "photos_pairs": ("photos_table", pairs),
    "photos_by_fifth": ("photos_table", by_fifth),
    "encoder_stability": ("fashion_stability", image_tables.stability),
}
"""By the name between the markers: the result file, and what makes the table from it."""


def update_docs() -> None:
    """Replace what stands between the markers of docs/evidence.md by tables of the newest results."""
    DOCS.write_text(rendered(DOCS.read_text()))


def rendered(page: str) -> str:
    """`page` with what stands between `<!-- table: NAME -->` and `<!-- end -->` made anew."""

    def made(name: str) -> str:
        file, make = TABLES[name]
        result = results.latest(file)
        return f"{make(result)}\n\n{_provenance(result)}"

    return filled(page, made)


def _provenance(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {result['versions'][name]}" for name in ("vmf_heads", "torch"))
    where = f"{result['device']}, {result['threads']} thread{'s' * (result['threads'] > 1)}, {result['date']}"
    # A run of vit_ssl knows how long its steps took, which depends on what else the machine was doing.
    key, of = ("cpu_seconds", "CPU time") if "cpu_seconds" in result["rows"][0] else ("seconds", "training")
    minutes = sum(row[key] for row in result["rows"]) / 60
    return f"*benchmarks/results/{result['benchmark']}: {where}; {versions}; {minutes:.0f} minutes of {of}.*"
