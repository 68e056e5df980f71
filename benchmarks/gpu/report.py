"""The tables of a GPU in docs/loss.md and docs/numerics.md, and its figures, all from the newest result files."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import results, step_costs
from benchmarks.gpu import figures
from benchmarks.gpu.job import ROOT, Job
from benchmarks.gpu.losses import file_name
from benchmarks.loss import contenders
from benchmarks.loss.report import lost, size_tables
from benchmarks.marked_tables import filled
from benchmarks.normalizer.report import method_table, speed_table

PAGES = ("loss.md", "numerics.md")
NOTHING = "On a GPU nothing has been measured yet."

Rows = list[dict[str, Any]]
Find = Callable[[str], dict[str, Any] | None]


def run(job: Job) -> list[str]:
    """Draw the figures and fill the tables; a rehearsal fills copies of the pages, beside its own results."""
    find = finder(job.device, job.results)
    figures.draw(find, job.images)
    for name in PAGES:
        page = job.root / "docs" / name
        text = rendered((ROOT / "docs" / name).read_text(), find)
        if not page.exists() or text != page.read_text():
            page.parent.mkdir(parents=True, exist_ok=True)
            page.write_text(text)
    return []


def finder(device: str = "cuda", folder: Path | None = None) -> Find:
    """A function from the name of a benchmark to its newest result on the device, or to None."""

    def find(name: str) -> dict[str, Any] | None:
        try:
            return results.latest(name, device, folder=folder)
        except FileNotFoundError:
            return None

    return find


def rendered(text: str, find: Find) -> str:
    """`text` with every `<!-- table: gpu NAME -->` filled; KeyError for an unknown NAME."""
    tables = {"loss": loss_tables, "normalizer": normalizer_tables}
    return filled(text, lambda name: tables[name](find) or NOTHING, group="gpu")


def loss_tables(find: Find) -> str:
    """The fused loss beside the others, the sizes of its chunks, whole training steps and every contender."""
    found = {dtype: result for dtype in ("bfloat16", "float32") if (result := find(file_name("loss", dtype)))}
    parts = []
    if found:
        parts += [ratio_table(found), f"*{provenance(next(iter(found.values())))}*"]
        parts += [f"{dtype}: {lost(result['rows'])}" for dtype, result in found.items()]
        if any("growth" in result for result in found.values()):
            parts.append(f"![Extra memory against batch size on a GPU](images/{figures.MEMORY_FIGURE})")
    if chunks := find("chunks"):
        parts += ["**Chunks of other sizes**, in MiB of float32 logits; time of a step in ms, the shortest in bold:"]
        parts += [chunk_table(chunks["rows"]), f"![Time against the size of a chunk](images/{figures.CHUNKS_FIGURE})"]
    if steps := find("training_step"):
        parts += ["**Whole training steps**, bfloat16 autocast, in proportion to plain DINO's:"]
        parts += [step_costs.table(own) for own in _by(steps["rows"], "size")]
    if found:
        every = [f"In {dtype}:\n\n{size_tables(result['rows'], digits=2)}" for dtype, result in found.items()]
        summary = "<summary>Every contender at every size on the GPU</summary>"
        parts.append("\n\n".join(['<details markdown="1">', summary, *every, "</details>"]))
    return "\n\n".join(parts)


def ratio_table(found: dict[str, dict[str, Any]]) -> str:
    """The fused loss beside plain DINO, the fastest other loss and its own products, one line per case."""
    lines = [
        "| dtype | crops × images, K | from | ms | time, to plain DINO's | to the fastest other's | to its products' "
        "| extra memory, to plain DINO's |",
        "|" + " --- |" * 8,
    ]
    for dtype, result in found.items():
        for rows in _by(result["rows"], "size", "start"):
            own = {row["contender"]: row for row in rows if "step_s" in row}
            if contenders.FUSED not in own:
                continue
            fused = own.pop(contenders.FUSED)
            floor = own.pop(contenders.PRODUCTS, None)
            plain = own.get(contenders.PLAIN)
            fastest = min(own.values(), key=lambda row: float(row["step_s"]), default=None)
            cells = [dtype, fused["size"], fused["start"].removeprefix("from "), f"{1e3 * fused['step_s']:.2f}"]
            cells += [_ratio(fused, plain, "step_s"), _ratio(fused, fastest, "step_s")]
            cells[-1] += f" ({fastest['contender']})" if fastest else ""
            cells += [_ratio(fused, floor, "step_s"), _ratio(fused, plain, "extra_bytes")]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def chunk_table(rows: Rows) -> str:
    """Milliseconds of the fused loss, one line per shape and dtype, one column per budget."""
    budgets = sorted({row["mebibytes"] for row in rows})
    lines = [
        "| crops × images, K | dtype | " + " | ".join(map(str, budgets)) + " |",
        "|" + " --- |" * (2 + len(budgets)),
    ]
    for own in _by(rows, "size", "dtype"):
        seconds = {row["mebibytes"]: row["step_s"] for row in own}
        best = min(seconds.values())
        cells = [f"{1e3 * each:.2f}" if (each := seconds.get(budget)) else "" for budget in budgets]
        cells = [f"**{cell}**" if seconds.get(b) == best else cell for b, cell in zip(budgets, cells, strict=True)]
        lines.append(f"| {own[0]['size']} | {own[0]['dtype']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def normalizer_tables(find: Find) -> str:
    """How often the normaliser is off by more than 4 eps, and its speed."""
    parts = []
    if accuracy := find("normalizer_accuracy"):
        parts += [method_table(accuracy["rows"]), f"*{provenance(accuracy)}*"]
    if speed := find("normalizer_speed"):
        parts += ["Nanoseconds per element, as under [Speed](#speed):", speed_table(speed["rows"])]
    return "\n\n".join(parts)


def provenance(result: dict[str, Any]) -> str:
    """What a result was measured on, and when."""
    packages = result["versions"] | result.get("peers", {})
    versions = ", ".join(f"{name} {version}" for name, version in packages.items())
    return f"{result['device']}, {result['date']}; {versions}; `python -m benchmarks gpu`."


def _by(rows: Rows, *keys: str) -> Iterator[Rows]:
    """The rows that agree in these keys, in the order of the first of each."""
    for values in dict.fromkeys(tuple(row[key] for key in keys) for row in rows):
        yield [row for row in rows if tuple(row[key] for key in keys) == values]


def _ratio(row: dict[str, Any], other: dict[str, Any] | None, key: str) -> str:
    return f"{row[key] / other[key]:.2f}" if other and other.get(key) else ""
