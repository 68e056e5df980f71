"""The pictures of docs/evidence.md: use of the prototypes by reading, and Figures 2, 6 and 7 of the paper."""

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import results
from benchmarks.evidence.summary import Rows, mean_and_error, select
from reporting.several_runs import charts

IMAGES = Path(__file__).parents[2] / "docs" / "images"
COLOURS = {
    "none, logit": ("plain DINO", "#c0392b", "s"),
    "vMF, responsibilities": ("vMF, centre on responsibilities", "#1f6fb4", "o"),
    "vMF, scores": ("vMF, centre on scores", "#e08a1e", "^"),
}
FIFTHS = ("lowest κ", "2", "3", "4", "highest κ")


def draw() -> None:
    """Write docs/images/evidence_*.svg from the newest results."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    matplotlib.rcParams["svg.hashsalt"] = "vmf_heads"  # the same file on every machine
    IMAGES.mkdir(parents=True, exist_ok=True)
    _readings()
    _images("fashion_table", "share of the prototypes that are targets in 30 steps")
    _images("photos_table", "different prototypes among the targets of a step")


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


def _images(name: str, what: str) -> None:
    """Figures 2, 6 and 7 of the paper and use over time, of the runs of a table; what it does not hold is left out."""
    try:
        result = results.latest(name)
    except FileNotFoundError:
        return
    rows = result["rows"]

    def series(key: str, shown: dict[str, str]) -> dict[str, np.ndarray]:
        found = {label: [row[key] for row in select(rows, arm=arm) if key in row] for arm, label in shown.items()}
        return {label: np.array(values, float) for label, values in found.items() if values}

    free = {arm: label for arm, (label, *_) in COLOURS.items()}
    shown = free | {"L2, logit": "L2-normalised, logit centre"}
    drawn = {"figure_2": charts.figure_2(series("knn_by_fifth", free), FIFTHS)}
    if unique := series("unique", shown):
        drawn["figures_6_7"] = charts.duplicates(result["cosines"], unique, series("largest_set", shown))
    if used := series("used_over_time", shown):
        parts = next(iter(used.values())).shape[1]
        ends = np.arange(1, parts + 1) / parts
        drawn["use"] = charts.over_time({what: used}, time="share of the training", ends=ends.tolist())
    for figure, svg in drawn.items():
        (IMAGES / f"evidence_{name.removesuffix('_table')}_{figure}.svg").write_text(svg)


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
