"""Charts of the prototypes from the tables in OUTPUT/prototypes/, as SVG for a light or a dark page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt

from evaluators.prototypes.tables import BY_KAPPA, DUPLICATES, PROTOTYPES, read_table
from reporting import charts


def duplicates(table: dict[str, np.ndarray], *, dark: bool = False) -> str:
    """Draw the unique prototypes and the largest set of duplicates against the cosine threshold (Figures 6 and 7)."""
    panels = {"unique": "Unique prototypes", "largest_set": "Largest set of duplicates"}
    with plt.rc_context(charts.style(dark)):
        figure, axes = plt.subplots(1, 2, figsize=(9.2, 3.4), layout="constrained")
        for axis, (column, title) in zip(axes, panels.items(), strict=True):
            axis.plot(table["cosine"], table[column], color=charts.COLORS[dark][0], marker="o", markersize=4)
            axis.set(title=title, xlabel="cosine above which prototypes are duplicates")
            axis.set_ylim(0, 1.12 * table[column].max())
            axis.yaxis.get_major_locator().set_params(integer=True)
            for x, y in zip(table["cosine"], table[column], strict=True):
                axis.annotate(f"{y:.0f}", (x, y), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=8)
        return charts.to_svg(figure)


def void(table: dict[str, np.ndarray], *, dark: bool = False) -> str:
    """Draw how prototypes lie to -mean(y), those that some image chooses beside those that none does."""
    cosine, used = table["cosine_to_minus_mean"], table["images_by_logits"] > 0
    groups = {"chosen by some image": cosine[used], "chosen by none": cosine[~used]}
    with plt.rc_context(charts.style(dark)):
        figure, axis = plt.subplots(figsize=(9.2, 2.8), layout="constrained")
        axis.hist(
            list(groups.values()), bins=np.linspace(-1, 1, 61), stacked=True, color=charts.COLORS[dark],
            label=[f"{label}: {len(values)}" for label, values in groups.items()],
        )  # fmt: skip
        axis.set(xlabel="cosine of a prototype with −mean(y)", ylabel="prototypes", xlim=(-1, 1))
        axis.yaxis.get_major_locator().set_params(integer=True)
        axis.legend(loc="upper right")
        return charts.to_svg(figure)


def by_kappa(table: dict[str, np.ndarray], *, dark: bool = False) -> str:
    """Draw the kNN accuracy of images by percentiles of their component's kappa, with standard errors (Figure 2)."""
    names = [f"{percentiles} %" for percentiles in table["percentiles"]]
    with plt.rc_context(charts.style(dark)):
        figure, axis = plt.subplots(figsize=(9.2, 3.2), layout="constrained")
        axis.errorbar(
            names, 100 * table["top1"], 100 * table["standard_error"],
            fmt="o-", color=charts.COLORS[dark][0], ecolor=charts.FAINT[dark], capsize=3, markersize=5,
        )  # fmt: skip
        labels = [
            f"{name}\nκ {low:.3g} to {high:.3g}\n{n:.0f} images"
            for name, low, high, n in zip(names, table["kappa_low"], table["kappa_high"], table["n"], strict=True)
        ]
        axis.set_xticks(range(len(names)), labels)
        axis.set(ylabel="kNN, per cent", xlabel="percentiles of κ of the component that an image belongs to")
        axis.margins(x=0.08)
        return charts.to_svg(figure)


CHARTS: dict[str, tuple[str, str, Callable[..., str]]] = {
    "duplicates": (DUPLICATES, "unique", duplicates),
    "void": (PROTOTYPES, "cosine_to_minus_mean", void),
    "knn_by_kappa": (BY_KAPPA, "top1", by_kappa),
}
"""By a picture's name: the table it is drawn from, a column that the table must have, and the function that draws."""


def draw_charts(folder: Path) -> None:
    """Write FOLDER/NAME.svg for every chart whose numbers are there."""
    for name in CHARTS:
        path = folder / f"{name}.svg"
        path.unlink(missing_ok=True)
        if drawn := draw_chart(folder, name):
            path.write_text(drawn, encoding="utf-8")


def draw_chart(folder: Path, name: str, *, dark: bool = False) -> str:
    """Return one of CHARTS from the tables in FOLDER; empty where its numbers are not there."""
    table, column, draw = CHARTS[name]
    columns = read_table(folder / table) if (folder / table).is_file() else {}
    return draw(columns, dark=dark) if column in columns else ""
