"""What is asked of trained prototypes whose data are known."""

import math
from typing import Any

import torch
from examples.known_mixture import concentration
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn import functional as F

from benchmarks.mixture.problem import Problem
from benchmarks.mixture.train import Run


def measures(run: Run, losses: Tensor, problem: Problem) -> list[dict[str, Any]]:
    """One row per seed: use of the prototypes, purity, what the norms mean, entropies, and how quiet training was."""
    seeds, clusters, count, _ = problem.points.shape
    everything = run.teacher_logits(problem.points.flatten(1, 2))
    cluster = torch.arange(clusters).repeat_interleave(count)
    norms = run.teacher[1].abs()
    rows = []
    for s in range(seeds):
        logits = {name: value[s] for name, value in everything.items()}
        winner = logits["logits"].argmax(1)
        rows.append(
            {f"used_by_{name}": used(value) for name, value in logits.items()}
            | clustering(winner, cluster, norms[s], problem.points[s].flatten(0, 1), problem.kappa)
            | entropies(logits["targets"].exp())
            | {
                "norm_min": float(norms[s].min()),
                "norm_max": float(norms[s].max()),
                "kappa_spread": spread(norms[s]),
                "loss": float(losses[-100:, s].mean()),
                "spike": spike(losses[:, s]),
                "finite": bool(losses[:, s].isfinite().all()),
            }
        )
    return rows


def used(logits: Tensor) -> float:
    """The share of the prototypes that are the largest logit of some point."""
    return len(logits.argmax(1).unique()) / logits.shape[1]


def clustering(winner: Tensor, cluster: Tensor, norms: Tensor, points: Tensor, kappa: Tensor) -> dict[str, Any]:
    """Of points (N, p) of a known `cluster`, won by a prototype each.

    Purity is the share of points whose prototype has the majority in their cluster. A norm is compared with the true
    kappa of that cluster, and with the maximum-likelihood kappa of the points that the prototype won (20 at least).
    """
    table = torch.zeros(len(norms), len(kappa)).index_put_((winner, cluster), torch.ones(len(winner)), accumulate=True)
    size, (largest, majority) = table.sum(1), table.max(1)
    wins = size > 0
    sums = torch.zeros(len(norms), points.shape[1]).index_add_(0, winner, points)
    many = size >= 20
    own = concentration(sums[many].norm(dim=1) / size[many], points.shape[1])
    return {
        "purity": float(largest.sum() / size.sum()),
        "clusters_found": len(majority[wins].unique()) / len(kappa),
        "rank_correlation": rank_correlation(norms[wins], kappa[majority[wins]]),
        "rank_correlation_own": rank_correlation(norms[many], own),
    }


def rank_correlation(x: Tensor, y: Tensor) -> float | None:
    """Spearman's; None where it is not defined: of fewer than three values, or of a constant."""
    if len(x) < 3 or len(x.unique()) < 2 or len(y.unique()) < 2:
        return None
    return float(spearmanr(x.numpy(), y.numpy()).statistic)


def entropies(targets: Tensor) -> dict[str, float]:
    """Mean entropy of a target, entropy of the mean target (ln K: balanced), and the mean target's extremes times K."""
    mean = targets.mean(0)
    k = len(mean)
    return {
        "target_entropy": float(-torch.xlogy(targets, targets).sum(1).mean()) / math.log(k),
        "marginal_entropy": float(-torch.xlogy(mean, mean).sum()) / math.log(k),
        "mean_target_min": float(mean.min()) * k,
        "mean_target_max": float(mean.max()) * k,
    }


def spread(norms: Tensor) -> float:
    """The ratio of the 95 % to the 5 % quantile."""
    low, high = norms.quantile(torch.tensor([0.05, 0.95]))
    return float(high / low.clamp(min=1e-6))


def spike(losses: Tensor) -> float:
    """The largest rise of the loss, averaged over 10 steps, above its own level of the 100 steps before."""
    if len(losses) < 220:
        return 0.0
    smooth = F.avg_pool1d(losses[None, None], 10, stride=10)[0, 0]
    before = F.avg_pool1d(smooth[None, None], 10, stride=1)[0, 0]
    return float((smooth[11:] - before[1:-1]).max())
