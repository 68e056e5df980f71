"""`python -m benchmarks scale`: what a head costs a rank, replicated, gathered by FSDP2, or sharded over ranks."""

from benchmarks import results
from benchmarks.scale import report
from benchmarks.scale.measure import measure
from benchmarks.scale.model import GATHERED, REPLICATED, Setting

# Small, but so that prototypes take much more than the rows that meet them, as in a large head.
MEASURED = {"prototypes": 2**14 + 1, "dim": 64, "student_rows": 96, "teacher_rows": 32, "chunk_bytes": 2**20}
CROPS = 6  # of 16 images
SHARDS = {2: (REPLICATED, GATHERED, 2), 4: (REPLICATED, GATHERED, 2, 4)}


def scale(*, images: int = 64, crops: int = 12, quick: bool = False) -> None:
    """Print bytes sent and held for each layout, beside those of real steps of two and four ranks over gloo.

    Writes benchmarks/results/scale_cpu_*.json, docs/images/scale.svg and the tables of docs/scale.md. The measured part
    takes about a minute on two quiet CPU cores.

    Args:
        images: of one rank in a step, for the table and the figure.
        crops: of each image, of which the teacher sees two.
        quick: only the table, printed and not written.
    """
    if images < 1 or crops < 2:
        raise ValueError(f"`images` (={images}) must be at least 1 and `crops` (={crops}) at least 2")
    batch = {"student_rows": crops * images, "teacher_rows": 2 * images}
    print(report.model_table(batch))
    if quick:
        return
    rows = measured()
    print(report.measured_table({"head": MEASURED, "rows": rows}))
    print(results.write("scale", "cpu", rows, head=MEASURED, batch=batch))
    report.draw(batch)
    report.update_docs()


def measured() -> list[dict[str, object]]:
    """One row for each number of ranks and layout: what a step of one rank does."""
    rows: list[dict[str, object]] = []
    for ranks, shards in SHARDS.items():
        found = measure(Setting(ranks=ranks, **MEASURED), shards, CROPS)
        rows += [
            {"ranks": ranks, "shards": number} | cost._asdict() for number, cost in zip(shards, found, strict=True)
        ]
    return rows
