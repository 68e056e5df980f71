"""Figures of a GPU: extra memory of the loss against batch size, and its time against the size of a chunk."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.loss import figures

CHUNKS_FIGURE, MEMORY_FIGURE = "loss_chunks_cuda.svg", "loss_memory_cuda.svg"


def draw(find: Callable[[str], dict[str, Any] | None], images: Path) -> None:
    """Write into the folder `images` what `find` has results for: a function from a benchmark's name to its result."""
    figures.prepare(images)
    loss, chunks = find("loss_bfloat16"), find("chunks")
    if loss and "growth" in loss:
        figures.memory(loss["growth"], images / MEMORY_FIGURE)
    if chunks:
        _chunks(chunks["rows"], images / CHUNKS_FIGURE)


def _chunks(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.4), layout="constrained")
    for size, dtype in dict.fromkeys((row["size"], row["dtype"]) for row in rows):
        own = [row for row in rows if (row["size"], row["dtype"]) == (size, dtype)]
        best = min(row["step_s"] for row in own)
        times = [row["step_s"] / best for row in own]
        axes.plot([row["mebibytes"] for row in own], times, "o-", label=f"{size}, {dtype}")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="logits of a chunk, MiB", ylabel="time, to the shortest", ylim=(0.95, None))
    axes.legend(frameon=False, fontsize=8)
    figures.save(figure, path)
