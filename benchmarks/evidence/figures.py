"""The pictures of docs/evidence.md: use of the prototypes by reading, and Figure 2 of the paper."""

from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.evidence.summary import Rows, mean_and_error, select

IMAGES = Path(__file__).parents[2] / "docs" / "images"
COLOURS = {
    "none, logit": ("plain DINO", "#c0392b", "s"),
    "vMF, scores": ("vMF, centre on scores", "#e08a1e", "^"),
    "vMF, responsibilities": ("vMF, centre on responsibilities", "#1f6fb4", "o"),
}


def draw() -> None:
    """Write docs/images/evidence_*.svg from the newest results."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    matplotlib.rcParams["svg.hashsalt"] = "vmf_heads"  # the same file on every machine
    IMAGES.mkdir(parents=True, exist_ok=True)
    _readings()
    _figure_2()


def _readings() -> None:
    """Four measures against the speed of the norms, p = 16, K = 64."""
    from matplotlib import pyplot

    rows = select(results.latest("mixture_readings")["rows"], p=16, prototypes=64, norm_decay=0.0)
    measures = {
        "used_by_logits": "share of prototypes used",
        "purity": "purity",
        "rank_correlation": "rank correlation with true κ",
    }
    figure, panels = pyplot.subplots(1, 3, figsize=(9, 2.9), layout="constrained")
    for panel, (measure, label) in zip(panels, measures.items(), strict=True):
        for arm, style in COLOURS.items():
            own = select(rows, arm=arm)
            _line(panel, own, measure, style)
        panel.set(xscale="log", xticks=[1, 3, 10], xlabel="learning rate of the norms, ×", title=label)
        panel.xaxis.set_major_formatter("{x:.0f}")
        panel.xaxis.set_minor_locator(pyplot.NullLocator())
        panel.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    _save(figure, "evidence_readings.svg")


def _figure_2() -> None:
    """kNN on Fashion-MNIST by fifth of the images' kappa."""
    from matplotlib import pyplot

    rows = results.latest("fashion_table")["rows"]
    figure, panel = pyplot.subplots(figsize=(5.6, 3.2), layout="constrained")
    for arm, (label, colour, marker) in COLOURS.items():
        own = select(rows, arm=arm)
        found = [mean_and_error(100 * row["knn_by_fifth"][i] for row in own) for i in range(5)]
        means, errors = zip(*(point for point in found if point), strict=True)
        panel.errorbar(range(1, 6), means, errors, label=label, color=colour, marker=marker, capsize=3)
    panel.set(xticks=range(1, 6), xlabel="fifth of the images, by κ of their component", ylabel="kNN accuracy, %")
    panel.legend(frameon=False)
    _save(figure, "evidence_figure_2.svg")


def _line(panel: Any, rows: Rows, measure: str, style: tuple[str, str, str]) -> None:
    label, colour, marker = style
    speeds = sorted({row["norm_speed"] for row in rows})
    found = [mean_and_error(row[measure] for row in select(rows, norm_speed=speed)) for speed in speeds]
    means, errors = zip(*(point for point in found if point), strict=True)
    panel.errorbar(speeds, means, errors, label=label, color=colour, marker=marker, capsize=3)


def _save(figure: Any, name: str) -> None:
    from matplotlib import pyplot

    figure.savefig(IMAGES / name, metadata={"Date": None})
    pyplot.close(figure)
