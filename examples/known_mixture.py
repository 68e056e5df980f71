"""What DINO-vMF does to prototypes, on data whose truth is known: about a minute on one core.

    python examples/known_mixture.py

Sixteen clusters on a sphere have concentrations kappa from 15 to 300. The 64 prototypes of DINO, of DINO with
L2-normalised prototypes and of DINO-vMF learn them with DINO's loss from pairs of points of one cluster; there is no
encoder, so only prototypes, their norms and the centre can move. Beside them stands a von Mises-Fisher mixture fitted
by maximum likelihood. The script prints a table and draws `known_mixture.png`: the learnt ||w|| / tau against the true
kappa, and below it what the normalising constant does to two components on a circle.
"""

from __future__ import annotations

import argparse
import copy
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F

from vmf_heads import log_vmf_normalizer, vmf_mean_resultant
from vmf_heads.compat.dino import DINOHead, DINOLoss
from vmf_heads.optim import separate_norms

P, CLUSTERS, POINTS = 16, 16, 500
PROTOTYPES = 64
STUDENT_TEMP, TEACHER_TEMP = 0.1, 0.05
NORM_SPEED = 3.0
"""The norms learn this much faster than the directions: 1500 steps are a small part of a pretraining."""

STARTS = 20
"""The maximum-likelihood fit starts this many times, and the best fit is kept."""

METHODS = {
    "DINO": {"normalizer": "none", "centering": "logit"},
    "DINO, L2": {"normalizer": "none", "centering": "logit", "norm_last_layer": True},
    "DINO-vMF": {"normalizer": "vmf", "centering": "probability"},
}
MAXIMUM_LIKELIHOOD = "maximum likelihood"


@dataclass(frozen=True)
class Fitted:
    """Of one method and seed: kappa (K,) of the components, how many points each won (K,), and against the truth."""

    kappa: Tensor
    size: Tensor
    true_kappa: Tensor  # (K,) of the cluster that most of the points come from which the component won
    purity: float

    @property
    def used(self) -> Tensor:
        """Which components (K,) won any point."""
        return self.size > 0

    @property
    def rank_correlation(self) -> float:
        """Spearman's, of kappa with the truth, over the components in use; NaN where all kappa are equal."""
        kappa = self.kappa[self.used]
        if kappa.max() - kappa.min() < 1e-6 * kappa.max():
            return math.nan
        return float(spearmanr(kappa.numpy(), self.true_kappa[self.used].numpy()).statistic)


def main(steps: int = 1500, seeds: int = 3, output: Path = Path("known_mixture.png")) -> dict[str, list[Fitted]]:
    """Train and fit, print the table, draw the picture."""
    results: dict[str, list[Fitted]] = {}
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        true_kappa, points = known_mixture(generator)
        everything, cluster = points.flatten(0, 1), torch.arange(CLUSTERS).repeat_interleave(POINTS)
        for name, options in METHODS.items():
            head, _ = train(points, steps, generator, **options)
            with torch.no_grad():
                logits = head(everything) / STUDENT_TEMP + head.log_normalizer(STUDENT_TEMP)  # Eq. 6
            kappa = head.last_layer.norms.detach() / STUDENT_TEMP
            results.setdefault(name, []).append(compare(kappa, logits.argmax(1), cluster, true_kappa))
        kappa, logits = maximum_likelihood(everything, CLUSTERS, generator)
        results.setdefault(MAXIMUM_LIKELIHOOD, []).append(compare(kappa, logits.argmax(1), cluster, true_kappa))
    print(table(results))
    draw(results, output)
    print(f"\n{output}")
    return results


def known_mixture(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """kappa (C,) from 15 to 300, and points (C, n, p) of clusters in random directions."""
    means = F.normalize(torch.randn(CLUSTERS, P, generator=generator), dim=1)
    kappa = torch.logspace(math.log10(15), math.log10(300), CLUSTERS)
    return kappa, sample_vmf(means, kappa, POINTS, generator)


def sample_vmf(means: Tensor, kappa: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` points (C, count, p) of each component with mean direction `means` (C, p) and `kappa` (C,)."""
    p = means.shape[1]
    # The angle a to the mean has density exp(kappa cos a) sin(a)^(p-2): drawn by inverting its distribution on a grid.
    angles = torch.linspace(0, math.pi, 20001, dtype=torch.float64)[1:-1]
    log_density = kappa.double()[:, None] * angles.cos() + (p - 2) * angles.sin().log()
    cumulative = (log_density - log_density.amax(1, keepdim=True)).exp().cumsum(1)
    uniform = torch.rand(len(means), count, dtype=torch.float64, generator=generator) * cumulative[:, -1:]
    angle = angles[torch.searchsorted(cumulative, uniform).clamp(max=len(angles) - 1)]
    tangent = torch.randn(len(means), count, p, dtype=torch.float64, generator=generator)
    mean = means.double()[:, None]
    tangent = F.normalize(tangent - (tangent * mean).sum(-1, keepdim=True) * mean, dim=-1)
    return (angle.cos()[..., None] * mean + angle.sin()[..., None] * tangent).float()


def train(
    points: Tensor,
    steps: int,
    generator: torch.Generator,
    *,
    normalizer: str,
    centering: str,
    norm_last_layer: bool = False,
    batch: int = 256,
    lr: float = 5e-3,
) -> tuple[DINOHead, list[float]]:
    """The teacher's head after training, which returns raw scores, and the losses."""
    clusters, count, p = points.shape
    student = DINOHead(
        p, PROTOTYPES, norm_last_layer=norm_last_layer, nlayers=1, bottleneck_dim=p, normalizer=normalizer
    )
    student.mlp = nn.Identity()  # the points are on the sphere already
    student.last_layer.weight_v.data.normal_(generator=generator)
    teacher = copy.deepcopy(student)
    # One teacher temperature for the one "epoch"; two views of each item.
    options = {"center_on": "responsibilities"} if centering == "probability" else {}
    loss_fn = DINOLoss(PROTOTYPES, 2, TEACHER_TEMP, TEACHER_TEMP, 0, 1, STUDENT_TEMP, centering=centering, **options)
    loss_fn.attach(student, teacher)
    groups = [{"params": [student.last_layer.weight_v]}]
    if not norm_last_layer:
        groups = separate_norms(student.parameters(), student, lr=lr, lr_multiplier=NORM_SPEED)
    optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        item = torch.randint(clusters, (batch,), generator=generator).repeat(2)
        views = points[item, torch.randint(count, (2 * batch,), generator=generator)]
        loss = loss_fn(student(views), teacher(views), 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():  # EMA of the teacher
            for of_student, of_teacher in zip(student.parameters(), teacher.parameters(), strict=True):
                of_teacher.lerp_(of_student, 0.01)
        losses.append(loss.item())
    return teacher, losses


def maximum_likelihood(
    points: Tensor, components: int, generator: torch.Generator, *, iterations: int = 60
) -> tuple[Tensor, Tensor]:
    """kappa (K,) and the logits (N, K) of a mixture fitted to `points` (N, p) by EM, the best of several starts."""
    p = points.shape[1]
    best = (-math.inf, torch.empty(0), torch.empty(0))
    for _ in range(STARTS):
        means = spread_out(points, components, generator)
        kappa, log_share = torch.full((components,), 20.0), torch.full((components,), -math.log(components))
        for _ in range(iterations):
            logits = points @ (kappa[:, None] * means).T + log_vmf_normalizer(kappa, p) + log_share
            responsibilities = logits.softmax(1)  # E-step
            weight = responsibilities.sum(0)
            total = responsibilities.T @ points
            means = F.normalize(total, dim=1)  # M-step
            kappa = concentration(total.norm(dim=1) / weight, p)
            log_share = (weight / len(points)).log()
        likelihood = float(logits.logsumexp(1).mean())
        if likelihood > best[0]:
            best = (likelihood, kappa, logits)
    return best[1], best[2]


def spread_out(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` of the points, each drawn with a probability that grows with its distance to those drawn (k-means++)."""
    chosen = [points[int(torch.randint(len(points), (1,), generator=generator))]]
    for _ in range(count - 1):
        distance = 1 - (points @ torch.stack(chosen).T).amax(1)
        chosen.append(points[int(torch.multinomial(distance.clamp(min=0), 1, generator=generator))])
    return torch.stack(chosen)


def concentration(resultant: Tensor, p: int) -> Tensor:
    """The kappa whose mean resultant length A_p(kappa) is `resultant`: Newton's method from Banerjee's estimate."""
    r = resultant.double().clamp(1e-6, 1 - 1e-6)
    kappa = r * (p - r**2) / (1 - r**2)
    for _ in range(4):
        a = vmf_mean_resultant(kappa, p)
        kappa = (kappa - (a - r) / (1 - a**2 - (p - 1) * a / kappa)).clamp(min=1e-6)
    return kappa.to(resultant.dtype)


def compare(kappa: Tensor, winner: Tensor, cluster: Tensor, true_kappa: Tensor) -> Fitted:
    """Components of concentration `kappa` (K,) that won the points (N,), with the clusters that these come from."""
    table = torch.zeros(len(kappa), len(true_kappa))
    table.index_put_((winner, cluster), torch.ones(len(winner)), accumulate=True)
    largest, majority = table.max(1)
    return Fitted(kappa, table.sum(1), true_kappa[majority], float(largest.sum() / len(winner)))


def table(results: dict[str, list[Fitted]]) -> str:
    """One line per method: means over the seeds, and the standard deviation of the rank correlation."""
    lines = [f"{'':20}{'used':>10}{'purity':>9}{'rank correlation':>20}{'kappa of those in use':>24}"]
    for name, runs in results.items():
        used = sum(int(run.used.sum()) for run in runs) / len(runs)
        purity = sum(run.purity for run in runs) / len(runs)
        ranks = torch.tensor([run.rank_correlation for run in runs])
        deviation = f" ± {ranks.std():.2f}" if len(runs) > 1 else ""
        rank = "all kappa are equal" if ranks.isnan().all() else f"{ranks.mean():+.2f}{deviation}"
        kappa = torch.cat([run.kappa[run.used] for run in runs])
        spread = f"{kappa.min():.0f} to {kappa.max():.0f}"
        lines.append(f"{name:20}{f'{used:.0f} of {len(runs[0].kappa)}':>10}{purity:>9.2f}{rank:>20}{spread:>24}")
    return "\n".join(lines)


def draw(results: dict[str, list[Fitted]], path: Path) -> None:
    """Learnt against true concentrations of all seeds; below, two components on a circle (appendix A.1)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 13, "axes.spines.top": False, "axes.spines.right": False})
    figure = plt.figure(figsize=(11, 7.4), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[1.1, 1])
    for panel, (name, runs) in zip(above.subplots(1, len(results)), results.items(), strict=True):
        _scatter(panel, name, runs)
    above.supylabel("learnt κ", fontsize=13)
    above.supxlabel("true κ of the cluster that the prototype won", fontsize=13)
    below.suptitle("Two components on a circle: who gets which part?", fontsize=13)
    for panel, with_constant in zip(below.subplots(1, 2, subplot_kw={"aspect": "equal"}), (False, True), strict=True):
        _circle(panel, with_constant)
    figure.savefig(path, dpi=150, facecolor="white")
    plt.close(figure)


COLOURS = {"DINO": "#c0392b", "DINO, L2": "#6c757d", "DINO-vMF": "#1f6fb4", MAXIMUM_LIKELIHOOD: "#222222"}


def _scatter(panel, name: str, runs: list[Fitted]) -> None:
    for run in runs:
        used = run.used
        panel.scatter(run.true_kappa[used], run.kappa[used], s=26, color=COLOURS[name], alpha=0.6, linewidths=0)
    low, high = (4, 40) if name in METHODS else (10, 800)
    panel.set(xscale="log", yscale="log", xlim=(11, 400), ylim=(low, high), xticks=[20, 50, 100, 300])
    panel.set_yticks([5, 10, 20] if name in METHODS else [20, 50, 100, 300])
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_formatter("{x:.0f}")
        axis.set_minor_formatter("")
    used = sum(int(run.used.sum()) for run in runs) / len(runs)
    rank = sum(run.rank_correlation for run in runs) / len(runs)
    text = "all κ equal" if math.isnan(rank) else f"rank correlation {rank:+.2f}".replace("-", "−")
    panel.set_title(name, color=COLOURS[name], fontweight="bold", fontsize=15)
    panel.text(0.04, 0.98, f"{used:.0f} of {len(runs[0].kappa)} used\n{text}", transform=panel.transAxes, va="top")


def _circle(panel, with_constant: bool) -> None:
    """The points of the circle that go to a broad component (left) and to a concentrated one (right)."""
    kappa, directions = torch.tensor([2.0, 12.0]), torch.tensor([math.radians(140), math.radians(40)])
    angle = torch.linspace(0, 2 * math.pi, 1441)[:-1]
    logits = kappa * (angle[:, None] - directions).cos()
    density = (logits + log_vmf_normalizer(kappa, 2)).exp()
    winner = (logits + (log_vmf_normalizer(kappa, 2) if with_constant else 0)).argmax(1)
    x, y = angle.cos(), angle.sin()
    for component, colour in enumerate(("#e08a1e", "#1f6fb4")):
        mine = winner == component
        panel.scatter(x[mine], y[mine], s=26, color=colour, linewidths=0)
        radius = 1.06 + 0.55 * density[:, component]
        panel.plot(radius * x, radius * y, color=colour, linewidth=1.5)
        tip = 0.9 * torch.stack([directions[component].cos(), directions[component].sin()])
        length = float(kappa[component] / kappa.max()) ** 0.5
        panel.annotate("", tip * length, (0, 0), arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 2})
    share = float((winner == 1).float().mean())
    name, formula = ("DINO-vMF", "⟨w, y⟩/τ + log C(κ)") if with_constant else ("DINO", "⟨w, y⟩/τ")
    panel.set_title(name, color=COLOURS[name], fontweight="bold", fontsize=15)
    panel.text(0, -0.25, formula, ha="center")
    panel.text(0, -0.6, f"κ = 12 takes {share:.0%}", ha="center", color="#1f6fb4")
    panel.axis("off")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500, help="of training, 256 items each")
    parser.add_argument("--seeds", type=int, default=3, help="data and initialisations")
    parser.add_argument("--output", type=Path, default=Path("known_mixture.png"), help="the picture")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    main(arguments.steps, arguments.seeds, arguments.output)
