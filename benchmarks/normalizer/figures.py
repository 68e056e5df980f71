"""docs/images/normalizer_*.svg: error against kappa, and the paper's Figures 4 and 5 with exact values beside."""

from pathlib import Path

import numpy as np
import torch

from benchmarks.normalizer.accuracy import DTYPES, relative
from benchmarks.normalizer.peers import paper, scipy_ive
from benchmarks.normalizer.truth import Exact, load_truth
from vmf_heads import log_vmf_normalizer, vmf_mean_resultant

IMAGES = Path(__file__).parents[2] / "docs" / "images"
DIMENSIONS = (64, 256, 1024)
STYLES = {  # label: colour (distinct to colour-blind readers too), marker
    "vmf_heads": ("#0072B2", "o"),
    "paper, $U_0$": ("#D55E00", "s"),
    "scipy.special.ive": ("#009E73", "^"),
}


def draw() -> None:
    """Write the three figures."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    # Text as paths and a fixed salt: the same file on every machine.
    matplotlib.rcParams["svg.hashsalt"] = "vmf_heads"
    IMAGES.mkdir(parents=True, exist_ok=True)
    _errors(
        0, "log_c_relative", r"relative error of $D = \log C_p(\kappa) - \log C_p(0)$", "normalizer_value_error.svg"
    )
    _errors(1, "mean_resultant", r"relative error of the gradient, $A_p(\kappa)$", "normalizer_gradient_error.svg")
    _paper_figures("normalizer_dino_range.svg")


def _errors(which: int, quantity: str, title: str, name: str) -> None:
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(
        2, len(DIMENSIONS), figsize=(10, 5.6), sharex=True, sharey="row", layout="constrained"
    )
    for line, (dtype, torch_dtype) in zip(grid, DTYPES.items(), strict=True):
        eps = float(torch.finfo(torch_dtype).eps)
        for axes, p in zip(line, DIMENSIONS, strict=True):
            truth = load_truth()[p]
            shown = (truth.kappa >= 1e-3) & (truth.kappa <= 1e6)
            kappa = truth.kappa[shown].astype(dtype)
            exact: Exact = getattr(truth, quantity)
            exact = Exact(exact.high[shown], exact.low[shown])
            x = torch.from_numpy(kappa)
            results = {
                "vmf_heads": (log_vmf_normalizer(x, p, relative=True).numpy(), vmf_mean_resultant(x, p).numpy()),
                "paper, $U_0$": relative(truth, *paper(kappa, p)),
                "scipy.special.ive": relative(truth, *scipy_ive(kappa, p)),
            }
            for label, values in results.items():
                colour, marker = STYLES[label]
                error = np.abs(exact.error(values[which], values[which].dtype)) * eps
                axes.plot(kappa, np.maximum(error, eps / 20), marker, color=colour, ms=4, alpha=0.8, label=label)
                lost = kappa[~np.isfinite(values[which])]
                if lost.size:  # a rug at the top: inf or nan, which no error can show
                    axes.plot(
                        lost, np.full(lost.size, 0.97), "x", color=colour, ms=5, transform=axes.get_xaxis_transform()
                    )
            axes.axhline(4 * eps, color="0.5", lw=0.8, ls="--")
            axes.set(xscale="log", yscale="log", title=f"p = {p}, {dtype}")
        line[0].set_ylim(eps / 30, 1e6)
        line[0].set_ylabel("relative error")
    for axes in grid[-1]:
        axes.set_xlabel(r"$\kappa$")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(title + "; dashes: 4 eps; crosses: inf or nan")
    _save(figure, name)


def _paper_figures(name: str) -> None:
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    kappa = np.linspace(20, 500, 241)
    for p, style in zip(DIMENSIONS, (":", "-", "--"), strict=True):
        x = torch.from_numpy(kappa)
        ours = log_vmf_normalizer(x, p).numpy()
        left.plot(kappa, ours - ours[0], style, color=STYLES["vmf_heads"][0], label=f"p = {p}")
        for label, (log_c, _) in (("paper, $U_0$", paper(kappa, p)), ("scipy.special.ive", scipy_ive(kappa, p))):
            error = np.abs(log_c - ours)
            error[~np.isfinite(error)] = np.nan
            right.plot(kappa, np.maximum(error, 1e-14), style, color=STYLES[label][0], label=f"{label}, p = {p}")
    left.set(
        xlabel=r"$\kappa$",
        ylabel=r"$\log C_p(\kappa) - \log C_p(20)$",
        title="the normaliser in DINO's range (Figure 4)",
    )
    left.legend(frameon=False)
    right.set(xlabel=r"$\kappa$", ylabel="nats", yscale="log", title="difference to vmf_heads, float64 (Figure 5)")
    right.legend(frameon=False, ncols=2, fontsize=7)
    _save(figure, name)


def _save(figure: object, name: str) -> None:
    from matplotlib import pyplot

    figure.savefig(IMAGES / name, metadata={"Date": None})
    pyplot.close(figure)
