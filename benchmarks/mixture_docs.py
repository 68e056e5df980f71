"""The tables of docs/mixture.md."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import concentration, distinct, mixture_fit, ood, results, warm_start
from benchmarks.marked_tables import filled

DOCS = Path(__file__).parents[1] / "docs" / "mixture.md"
TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "concentration": concentration.table,
    "mixture_fit": mixture_fit.table,
    "warm_start": warm_start.table,
    "ood": ood.table,
    "distinct": distinct.table,
}
"""By the name of the result file, which stands between the markers: what makes the table from it."""


def update_docs() -> None:
    """Replace what stands between the markers of docs/mixture.md by tables of the newest results."""
    DOCS.write_text(rendered(DOCS.read_text()))


def rendered(page: str) -> str:
    """`page` with what stands between `<!-- table: NAME -->` and `<!-- end -->` made anew."""

    def made(name: str) -> str:
        result = results.latest(name)
        return f"{TABLES[name](result)}\n\n{_provenance(result)}"

    return filled(page, made)


def _provenance(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    threads = f"{result['threads']} thread{'s' if result['threads'] > 1 else ''}"
    return f"*{result['device']}, {threads}, {result['date']}; {versions}.*"
