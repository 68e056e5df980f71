"""The charts of the demo's report, from numbers alone: each function returns an SVG for a light or a dark page."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")  # draws into memory: there may be no display
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's palette, made to be told apart by colour-blind readers; lighter members on the dark page. The dashes
# tell the runs apart in a black-and-white print too.
COLORS = {False: ("#0072B2", "#D55E00"), True: ("#56B4E9", "#E69F00")}
DASHES: tuple[Any, ...] = ("solid", (0, (5, 1.5)))
INK = {False: "#1f2328", True: "#e6e6e3"}
FAINT = {False: "#8a8f98", True: "#85878c"}

Rows = Sequence[Mapping[str, float]]


def curves(metrics: Mapping[str, Rows], num_prototypes: Mapping[str, int], *, dark: bool = False) -> str:
    """Draw the loss, KL, target entropy and marginal entropy in nats against the epoch, one line per run.

    `metrics` maps a run's label to its rows of metrics.jsonl. Thin lines are single steps, thick ones the running mean
    over about an epoch. ln K, the entropy of the uniform distribution over the K prototypes, is marked where it bounds.
    """
    panels = {
        "loss": "Loss = target entropy + KL",
        "kl": "KL from targets to student",
        "target_entropy": "Entropy of the targets, mean over crops",
        "marginal_entropy": "Entropy of the mean target of a batch",
    }
    with plt.rc_context(style(dark)):
        figure, axes = plt.subplots(2, 2, figsize=(9.2, 5.6), sharex=True, layout="constrained")
        for axis, (key, title) in zip(axes.flat, panels.items(), strict=True):
            for index, (label, rows) in enumerate(metrics.items()):
                steps_per_epoch = max(1, sum(row["epoch"] == rows[0]["epoch"] for row in rows))
                epochs = np.array([row["step"] for row in rows]) / steps_per_epoch
                values = np.array([row[key] for row in rows], float)
                look = {"color": COLORS[dark][index], "linestyle": DASHES[index]}
                axis.plot(epochs, values, color=look["color"], linewidth=0.6, alpha=0.3)
                axis.plot(epochs, _running_mean(values, steps_per_epoch), **look, linewidth=1.8, label=label)
            axis.set_title(title)
            axis.margins(x=0)
            axis.set(xlim=(0, None), ylim=(0, None))
            axis.xaxis.get_major_locator().set_params(integer=True)
            if key != "kl":
                for size in sorted(set(num_prototypes.values())):
                    _horizontal(axis, float(np.log(size)), f"ln {size} = {np.log(size):.2f}", dark)
        figure.supxlabel("epoch", fontsize=11)
        figure.supylabel("nats", fontsize=11)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=len(labels))
        return to_svg(figure)


def kappa_histogram(kappas: Mapping[str, np.ndarray], temperature: float, *, dark: bool = False) -> str:
    """Draw how many prototypes have which concentration κ = ‖w‖/τ, one panel per run, with 1/τ marked.

    `kappas` maps a run's label to its κ (K,); `temperature` is the τ they were divided by.
    """
    start = 1 / temperature
    everything = np.concatenate([*kappas.values(), [start]])
    low, high = everything.min(), everything.max()
    bins = np.linspace(low - 0.02 * start, high + 0.02 * start, 41)
    with plt.rc_context(style(dark)):
        figure, axes = plt.subplots(
            len(kappas),
            1,
            figsize=(9.2, 1.0 + 1.7 * len(kappas)),
            sharex=True,
            sharey=True,
            squeeze=False,
            layout="constrained",
        )
        for index, (axis, (label, kappa)) in enumerate(zip(axes[:, 0], kappas.items(), strict=True)):
            axis.hist(kappa, bins=bins, color=COLORS[dark][index], edgecolor="none", alpha=0.9)
            axis.axvline(start, color=INK[dark], linewidth=1, linestyle=(0, (2, 2)))
            axis.set_title(f"{label}: median {np.median(kappa):.1f}, range {kappa.min():.1f} to {kappa.max():.1f}")
            axis.yaxis.get_major_locator().set_params(integer=True, nbins=4)
        axes[0, 0].margins(y=0.22)  # room for the label
        axes[0, 0].annotate(
            f"1/τ = {start:g}",
            (start, 1),
            xycoords=("data", "axes fraction"),
            xytext=(5, -4),
            textcoords="offset points",
            va="top",
        )
        axes[-1, 0].set_xlabel("κ = ‖w‖/τ of a prototype")
        figure.supylabel("prototypes", fontsize=11)
        return to_svg(figure)


def accuracy_by_kappa(ranges: Mapping[str, Rows], *, dark: bool = False) -> str:
    """Draw the kNN accuracy of images by the kappa of their component, one line per run, with standard errors.

    `ranges` maps a run's label to ranges of kappa from the lowest: `value` in [0, 1], `standard_error`, `n`.
    """
    with plt.rc_context(style(dark)):
        figure, axis = plt.subplots(figsize=(9.2, 3.2), layout="constrained")
        for index, (label, rows) in enumerate(ranges.items()):
            places = np.arange(1, len(rows) + 1) + 0.06 * (index - (len(ranges) - 1) / 2)
            values, errors = (100 * np.array([row[name] for row in rows]) for name in ("value", "standard_error"))
            axis.errorbar(
                places, values, errors, color=COLORS[dark][index], linestyle=DASHES[index], linewidth=1.8,
                marker="os"[index], markersize=5, capsize=3, label=label,
            )  # fmt: skip
        axis.set(xlabel="part of the test images, from the lowest κ to the highest", ylabel="kNN, per cent")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(loc="upper left")
        return to_svg(figure)


def usage(counts: Mapping[str, Mapping[str, np.ndarray]], *, dark: bool = False) -> str:
    """Draw the training images won by each prototype, sorted, on a log scale, in a panel for each way to choose.

    `counts` maps a panel's title to {run's label: counts (K,)}; K may differ between runs. A line ends at the last
    prototype that wins an image.
    """
    with plt.rc_context(style(dark)):
        figure, axes = plt.subplots(
            1, len(counts), figsize=(9.2, 3.5), sharey=True, squeeze=False, layout="constrained"
        )
        for axis, (title, runs) in zip(axes[0], counts.items(), strict=True):
            for index, (label, count) in enumerate(runs.items()):
                won = np.sort(count[count > 0])[::-1]
                ranks = np.arange(len(won) + 1) + 0.5
                axis.stairs(
                    won, ranks, baseline=None, color=COLORS[dark][index], linestyle=DASHES[index], linewidth=1.8,
                    label=f"{label}: {len(won)} of {len(count)} used",
                )  # fmt: skip
            images, size = max((int(count.sum()), len(count)) for count in runs.values())
            axis.axhline(images / size, color=FAINT[dark], linewidth=1, linestyle=(0, (2, 2)))
            axis.annotate(
                f"all equal: {images / size:.1f}", (1, images / size), xycoords=("axes fraction", "data"),
                xytext=(-2, 3), textcoords="offset points", ha="right", color=FAINT[dark],
            )  # fmt: skip
            axis.set(title=title, xlabel="prototype, most used first", yscale="log", xlim=(0, size + 1))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.legend(loc="upper right")
        axes[0, 0].set_ylabel("images won")
        axes[0, 0].set_ylim(top=4 * max(count.max() for runs in counts.values() for count in runs.values()))
        return to_svg(figure)


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    # The window is centred, so that the thick line does not lag behind the thin one; it shrinks at both ends.
    sums = np.cumsum(np.concatenate([[0.0], values]))
    here = np.arange(len(values))
    first, last = np.maximum(here - width // 2, 0), np.minimum(here + width // 2 + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def _horizontal(axis: Axes, y: float, text: str, dark: bool) -> None:
    axis.axhline(y, color=INK[dark], linewidth=1, linestyle=(0, (2, 2)))
    axis.set_ylim(top=max(axis.get_ylim()[1], 1.15 * y))
    place = {"xycoords": ("axes fraction", "data"), "xytext": (-3, 3), "textcoords": "offset points", "ha": "right"}
    axis.annotate(text, (1, y), **place)


def style(dark: bool) -> dict[str, Any]:
    """Return what all charts have in common, for plt.rc_context."""
    ink, faint = INK[dark], FAINT[dark]
    return {
        "font.family": "DejaVu Sans", "font.size": 10, "axes.titlesize": 11, "axes.titlelocation": "left",
        "text.color": ink, "axes.labelcolor": ink, "axes.titlecolor": ink,
        "xtick.labelcolor": ink, "ytick.labelcolor": ink,
        "axes.edgecolor": faint, "xtick.color": faint, "ytick.color": faint, "axes.linewidth": 0.8,
        "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "legend.handlelength": 2.6,
        "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none",
        "svg.fonttype": "path", "svg.hashsalt": "vmf_heads",
    }  # fmt: skip


def to_svg(figure: Figure) -> str:
    """Return the figure as text, and close it."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})  # the same numbers give the same file
    plt.close(figure)
    return buffer.getvalue()
