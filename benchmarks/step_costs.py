"""What whole training steps cost beside each other: seconds and peak bytes, and both in proportion to plain DINO's."""

from collections.abc import Callable
from typing import Any

from benchmarks.loss.memory import peak
from benchmarks.timing import interleaved_medians

PLAIN = "DINO"


def costs(
    steps: dict[str, Callable[[], object]], size: str, batch: int, device: str, rounds: int
) -> list[dict[str, Any]]:
    """One row per step, of which one is called `PLAIN`: all of `batch` images with a model of the same `size`."""
    seconds = interleaved_medians(steps, rounds=rounds, device=device)
    peaks = {name: peak(call, device) for name, call in steps.items()}
    return [
        {
            "size": size,
            "batch": batch,
            "contender": name,
            "seconds": seconds[name],
            "bytes": peaks[name],
            "time": seconds[name] / seconds[PLAIN],
            "memory": peaks[name] / peaks[PLAIN],
        }
        for name in steps
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows of one size as Markdown."""
    batch = " | largest batch" if "largest_batch" in rows[0] else ""
    lines = [f"| {rows[0]['size']}, {rows[0]['batch']} images | time | peak memory{batch} |"]
    lines.append("|---" * (3 + bool(batch)) + "|")
    for row in rows:
        cells = [row["contender"], f"{row['time']:.2f} ({row['seconds']:.2f} s)"]
        cells += [f"{row['memory']:.2f} ({row['bytes'] / 2**20:.0f} MiB)"]
        cells += [str(row["largest_batch"])] if batch else []
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
