"""The page of a run that is watched, OUTPUT/curves.html: curves of metrics.jsonl, and what they mean."""

from __future__ import annotations

from html import escape
from pathlib import Path
from string import Template
from typing import NamedTuple

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from reporting import charts
from reporting.several_runs.charts import LOOKS
from storage.json_lines import parsed
from storage.whole_file import whole_file
from training.log import METRICS

PAGE, PICTURE = "curves.html", "curves.svg"
TEMPLATE = Path(__file__).with_name("curves.html")
POINTS = 400
"""A curve of more rows is drawn by so many means, so that a long run is drawn as fast as a short one."""
KAPPAS = {"kappa_p95": "95 %", "kappa_p50": "median", "kappa_p05": "5 %"}
PANELS = {
    "Loss, nats": {"loss": "loss"},
    "Validation images, per cent": {"knn_top1": "kNN", "linear_top1": "linear probe"},
    "κ of the prototypes": KAPPAS,
    "Prototypes used in a step": {"prototypes_used": "largest target of some crop"},
    "Dimensions": {"rankme": "RankMe", "lidar": "LiDAR"},
    "Spread": {"alpha_req": "α-ReQ", "feature_std": "feature std"},
}
"""The columns of each panel, with their labels."""
MEANINGS = {
    "knn_top1": ("kNN, per cent", "validation images whose 20 nearest train images say the right class"),
    "linear_top1": ("linear probe, per cent", "the same, by a ridge classifier"),
    "rankme": ("RankMe", "dimensions that the features fill; more is better, among runs that are alike"),
    "lidar": ("LiDAR", "dimensions that tell images apart, beyond what augmentation changes; more is better"),
    "alpha_req": ("α-ReQ", "decay of the spectrum; near 1 is good, far above it few dimensions carry everything"),
    "feature_std": ("feature std", "1: features spread in all directions; 0: all are the same"),
}
PER_CENT = ("knn_top1", "linear_top1")


class Curve(NamedTuple):
    """A column of metrics.jsonl: the rows that have it."""

    steps: np.ndarray
    values: np.ndarray


def write_curves(output: Path, name: str, *, refresh: bool) -> None:
    """Write OUTPUT/curves.html from OUTPUT/metrics.jsonl: one file without scripts, which needs no network.

    With `refresh`, for a run that goes on, a browser loads it again every minute. The curves alone are in curves.svg.
    """
    curves = read_curves(output / METRICS)
    last = max((int(curve.steps[-1]) for curve in curves.values() if len(curve.steps)), default=0)
    chart = draw(curves)
    page = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(name),
        refresh='<meta http-equiv="refresh" content="60">' if refresh else "",
        state=f"step {last}, the run goes on" if refresh else f"step {last}",
        table=_table(curves),
        chart=_svg(chart),
    )
    with whole_file(output / PICTURE) as file:
        file.write(chart.encode())
    with whole_file(output / PAGE) as file:
        file.write(page.encode())


def read_curves(path: Path) -> dict[str, Curve]:
    """Return what the panels show; of a long file only these columns are held, and damaged lines are left out."""
    columns: dict[str, list[tuple[int, float]]] = {name: [] for panel in PANELS.values() for name in panel}
    with path.open("rb") as file:
        for line in file:
            row = parsed(line) or {}
            for name, points in columns.items():
                if name in row and "step" in row:
                    points.append((row["step"], row[name] * (100 if name in PER_CENT else 1)))
    return {name: Curve(*np.array(points, float).reshape(-1, 2).T) for name, points in columns.items()}


def thinned(curve: Curve, points: int = POINTS) -> Curve:
    """Return a curve of at most `points` points, means of consecutive rows; a shorter one stays as it is."""
    if len(curve.steps) <= points:
        return curve
    parts = [np.array_split(column, points) for column in curve]
    return Curve(*(np.array([part.mean() for part in column]) for column in parts))


def draw(curves: dict[str, Curve]) -> str:
    """Return the panels over the step as SVG; a panel without a number is left out."""
    panels = {title: found for title, names in PANELS.items() if (found := _present(names, curves))}
    rows = -(-len(panels) // 3)
    with plt.rc_context(charts.style(dark=False)):
        # Fixed margins, because looking for good ones takes three times as long as drawing.
        figure, axes = plt.subplots(rows, 3, figsize=(12, 3.1 * rows), squeeze=False)
        figure.subplots_adjust(left=0.045, right=0.99, top=1 - 0.11 / rows, bottom=0.16 / rows, wspace=0.16, hspace=0.4)
        for axis, (title, found) in zip(axes.flat, panels.items(), strict=False):
            _panel(axis, title, found)
        for axis in list(axes.flat)[len(panels) :]:
            axis.set_visible(False)
        return charts.to_svg(figure)


def _present(names: dict[str, str], curves: dict[str, Curve]) -> dict[str, Curve]:
    return {label: curves[name] for name, label in names.items() if len(curves[name].steps)}


def _panel(axis: Axes, title: str, found: dict[str, Curve]) -> None:
    for (label, curve), (color, marker) in zip(found.items(), LOOKS, strict=False):
        shown = thinned(curve)
        few = len(shown.steps) <= 40
        axis.plot(*shown, color=color, marker=marker if few else None, markersize=4, linewidth=1.4, label=label)
    axis.set_title(title)
    axis.set_xlabel("step")
    axis.set_xlim(0, None)
    axis.margins(y=0.2)  # room for the legend, whose place is fixed because looking for a good one takes long
    if len(found) > 1:
        axis.legend(loc="upper left", ncols=len(found))


def _table(curves: dict[str, Curve]) -> str:
    body = ""
    for name, (title, meaning) in MEANINGS.items():
        steps, values = curves[name]
        if len(steps):
            cells = f"<td>{values[0]:.3g}</td><td>{values[-1]:.3g}</td><td>{escape(meaning)}</td>"
            body += f"<tr><th scope='row'>{escape(title)}</th>{cells}</tr>"
    looks = curves["feature_std"].steps
    if not len(looks):
        return ""
    head = "".join(f"<th>{text}</th>" for text in ("", f"step {looks[0]:.0f}", f"step {looks[-1]:.0f}", ""))
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _svg(text: str) -> str:
    # Inside the page, where its style sheet can turn the colours for a dark page, and without the head of a file.
    return text[text.index("<svg ") :]
