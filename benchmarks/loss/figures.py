"""docs/images/loss_*.svg: extra memory against batch size, and what the plain and the fused loss store."""

from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.loss import contenders

IMAGES = Path(__file__).parents[2] / "docs" / "images"
STYLES = {contenders.PLAIN: ("#D55E00", "s"), contenders.FUSED: ("#0072B2", "o")}  # distinct to colour-blind readers


def draw() -> None:
    """Write both figures; the first from the newest CPU results."""
    prepare(IMAGES)
    memory(results.latest("loss")["growth"], IMAGES / "loss_memory.svg")
    _storage()


def prepare(images: Path) -> None:
    """Make the folder `images`, and matplotlib draw the same file on every machine."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    matplotlib.rcParams["svg.hashsalt"] = "vmf_heads"
    images.mkdir(parents=True, exist_ok=True)


def memory(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw what `measure.memory_by_batch` found."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.4), layout="constrained")
    for name, (colour, marker) in STYLES.items():
        own = [row for row in rows if row["contender"] == name]
        mebibytes = [row["extra_bytes"] / 2**20 for row in own]
        axes.plot([row["images"] for row in own], mebibytes, marker + "-", color=colour, label=name)
    axes.set(xlabel="images (10 crops each, K = 65 536)", ylabel="extra memory, MiB", ylim=(0, None))
    axes.legend(frameon=False)
    save(figure, path)


def _storage() -> None:
    """(rows, K) matrices drawn to scale: what exists at a time for 10 crops of 64 images, p = 256."""
    from matplotlib import pyplot
    from matplotlib.patches import Rectangle

    orange, blue = (colour for colour, _ in STYLES.values())
    gradient = (256, "gradient of the prototypes: K × p, p = 256", "0.5")
    panels = {
        "plain: everything waits for the backward pass": [
            (640, "student logits: K × 640 rows", orange),
            (1152, "log-softmaxes of 18 pairs of crops: K × 1152", orange),
            (1152, "negated targets of 18 pairs: K × 1152", orange),
            (128, "teacher targets: K × 128", orange),
            gradient,
        ],
        "fused: gradients are finished chunk by chunk": [(128, "logits of one chunk: K × 128", blue), gradient],
    }
    figure, grid = pyplot.subplots(1, 2, figsize=(9, 5), layout="constrained", sharey=True)
    for axes, (title, boxes) in zip(grid, panels.items(), strict=True):
        top = 0
        for rows, label, colour in boxes:
            axes.add_patch(Rectangle((0, top), 1, rows, facecolor=colour, alpha=0.25, edgecolor=colour))
            axes.text(0.5, top + rows / 2, label, ha="center", va="center")
            top += rows + 20
        axes.set(title=title, xlim=(-0.02, 1.02), ylim=(3450, -20), xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    chunks = "each chunk gives P W and Pᵀ Y, which are added up;\nthe next one overwrites it"
    grid[1].text(0.5, 620, chunks, ha="center", va="center", color="0.4")
    save(figure, IMAGES / "loss_storage.svg")


def save(figure: Any, path: Path) -> None:
    """Write a figure without the date, and close it."""
    from matplotlib import pyplot

    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
