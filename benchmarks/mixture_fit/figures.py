"""docs/images/mixture_fit.png and mixture_density.png."""

import math
from pathlib import Path

import torch

from vmf_heads.mixture import VMFMixture, fit_vmf_mixture

IMAGES = Path(__file__).parents[2] / "docs" / "images"
BLUE, GREY = "#0072B2", "#999999"


def draw(truth: VMFMixture, rows: int) -> None:
    """Write both pictures; the first is of a fit to so many rows of `truth`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    IMAGES.mkdir(parents=True, exist_ok=True)
    for figure, name in ((_fit(truth, rows), "mixture_fit.png"), (_density(), "mixture_density.png")):
        figure.savefig(IMAGES / name, dpi=150, facecolor="white")
        pyplot.close(figure)


def _fit(truth: VMFMixture, rows: int):
    """The likelihood of each pass, and fitted against true kappa."""
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator

    features, _ = truth.sample(rows, torch.Generator().manual_seed(0))
    fit = fit_vmf_mixture(features, truth.num_components, tolerance=1e-6)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    left.plot(range(1, len(fit.log_likelihoods) + 1), fit.log_likelihoods, "o-", ms=3, color=BLUE)
    left.axhline(truth.log_prob(features).mean().item(), color=GREY, ls="--", label="the true mixture")
    left.set(xlabel="pass", ylabel="log-likelihood, nats per row")
    left.legend()
    nearest = (truth.directions @ fit.mixture.directions.T).argmax(1)
    right.loglog(truth.kappa, fit.mixture.kappa[nearest], "o", ms=4, color=BLUE)
    ends = [truth.kappa.min().item(), truth.kappa.max().item()]
    right.loglog(ends, ends, color=GREY, ls="--")
    for axis in (right.xaxis, right.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:.0f}")
        axis.set_minor_formatter("")
    right.set(xlabel="true κ", ylabel="fitted κ of the nearest component")
    return figure


def _density():
    """A mixture on the sphere in three dimensions: its density, its samples, and the overlaps of its components."""
    from matplotlib import pyplot

    angles = torch.tensor([[-1.9, 0.3], [0.2, -0.4], [0.9, 0.35]])  # longitude, latitude
    directions = torch.stack(
        [angles[:, 1].cos() * angles[:, 0].cos(), angles[:, 1].cos() * angles[:, 0].sin(), angles[:, 1].sin()], dim=1
    )
    mixture = VMFMixture(torch.tensor([0.4, 0.35, 0.25]), directions, torch.tensor([3.0, 12.0, 40.0]))
    longitude, latitude = torch.meshgrid(
        torch.linspace(-math.pi, math.pi, 361), torch.linspace(-math.pi / 2, math.pi / 2, 181), indexing="xy"
    )
    grid = torch.stack([latitude.cos() * longitude.cos(), latitude.cos() * longitude.sin(), latitude.sin()], dim=-1)
    points, component = mixture.sample(600, torch.Generator().manual_seed(0))
    figure = pyplot.figure(figsize=(9, 3), layout="constrained")
    panel = figure.add_subplot(1, 2, 1, projection="mollweide")
    panel.pcolormesh(longitude, latitude, mixture.log_prob(grid), shading="auto", cmap="viridis", vmin=-8)
    panel.set_title("log-density")
    panel.set_axis_off()
    panel = figure.add_subplot(1, 2, 2, projection="mollweide")
    colours = ["#E69F00", BLUE, "#009E73"]
    for k, colour in enumerate(colours):
        x, y, z = points[component == k].T
        panel.scatter(torch.atan2(y, x), z.clamp(-1, 1).asin(), s=4, color=colour, label=f"κ = {mixture.kappa[k]:.0f}")
    panel.set_title("samples")
    panel.set(xticklabels=[], yticklabels=[])
    panel.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure
