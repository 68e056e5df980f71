"""The paper's figures from several seeds: means over the seeds with their standard errors, as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reporting import charts

LOOKS = (("#D55E00", "s"), ("#0072B2", "o"), ("#E69F00", "^"), ("#009E73", "D"), ("#CC79A7", "v"), ("#56B4E9", "P"))
LOOKS += (("#6a3d9a", "X"), ("#808080", "*"))
"""Colour and marker of the first, second, ... setting; most colours are Okabe and Ito's."""

Series = Mapping[str, np.ndarray]
"""By the label of a setting: a row for each seed, a column for each place on the x axis; NaN where there is nothing."""


def figure_2(accuracies: Series, ranges: Sequence[str]) -> str:
    """Draw the kNN accuracy of images by percentiles of the kappa of their component (Figure 2).

    `accuracies` are in [0, 1] (S, R) for R `ranges` of percentiles.
    """
    with plt.rc_context(charts.style(dark=False)):
        figure, axis = plt.subplots(figsize=(7.2, 3.6), layout="constrained")
        _lines(axis, np.arange(len(ranges)), {label: 100 * values for label, values in accuracies.items()}, apart=0.06)
        axis.set_xticks(range(len(ranges)), ranges)
        axis.set(xlabel="images, divided by the κ of the component they belong to", ylabel="kNN, per cent")
        return _finish(figure, [axis])


def duplicates(cosines: Sequence[float], unique: Series, largest_set: Series) -> str:
    """Draw the shares of unique prototypes and of the largest set of duplicates against the cosine (Figures 6, 7)."""
    panels = {"Unique prototypes": unique, "Largest set of duplicates": largest_set}
    with plt.rc_context(charts.style(dark=False)):
        figure, axes = plt.subplots(1, 2, figsize=(9.2, 3.6), layout="constrained")
        for axis, (title, series) in zip(axes, panels.items(), strict=True):
            _lines(axis, np.asarray(cosines), {label: 100 * values for label, values in series.items()})
            axis.set(title=title, xlabel="cosine above which prototypes are duplicates", ylim=(0, None))
        axes[0].set_ylabel("per cent of the prototypes")
        return _finish(figure, list(axes))


def over_time(panels: Mapping[str, Series], *, time: str, ends: Sequence[float] | None = None) -> str:
    """Draw series against the training time, a panel for each title; all have the values of equal parts of a training.

    `time` is what the x axis says, `ends` where the parts end on it; by default 1, 2, ...
    """
    with plt.rc_context(charts.style(dark=False)):
        size = (2.0 + 4.0 * len(panels), 3.4)
        figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
        for axis, (title, series) in zip(axes[0], panels.items(), strict=True):
            parts = max(values.shape[1] for values in series.values())
            _lines(axis, np.asarray(ends if ends is not None else np.arange(1, parts + 1)), series, markersize=3)
            axis.set(title=title, xlabel=time, ylim=(0, None), xlim=(0, None))
        return _finish(figure, list(axes[0]))


def mean_and_error(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean over the seeds (X,) and its standard error (X,), NaN for one seed, of values (S, X).

    A seed that has no number in a column, NaN, is left out of it.
    """
    counts = (~np.isnan(values)).sum(axis=0)
    means, errors = np.full(values.shape[1], np.nan), np.full(values.shape[1], np.nan)
    some, several = counts > 0, counts > 1
    means[some] = np.nanmean(values[:, some], axis=0)
    errors[several] = np.nanstd(values[:, several], axis=0, ddof=1) / np.sqrt(counts[several])
    return means, errors


def _lines(axis: Axes, x: np.ndarray, series: Series, *, apart: float = 0.0, markersize: float = 4.5) -> None:
    # With `apart`, the settings stand side by side at each place, so that error bars do not cover each other.
    middle = (len(series) - 1) / 2
    for index, (label, values) in enumerate(series.items()):
        colour, marker = LOOKS[index % len(LOOKS)]
        means, errors = mean_and_error(values)
        axis.errorbar(
            x[: len(means)] + apart * (index - middle), means, np.nan_to_num(errors), label=label, color=colour,
            marker=marker, markersize=markersize, linewidth=1.5, elinewidth=1, capsize=2,
        )  # fmt: skip


def _finish(figure: Figure, axes: list[Axes]) -> str:
    handles, labels = axes[0].get_legend_handles_labels()
    columns = 4 if figure.get_figwidth() > 8 else 2
    figure.legend(handles, labels, loc="outside lower center", ncols=min(columns, len(labels)))
    return charts.to_svg(figure)
