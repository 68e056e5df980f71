"""`python -m benchmarks mixture-fit`: fit_vmf_mixture and scikit-learn's k-means on mixtures of known truth."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from sklearn.cluster import KMeans
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from benchmarks import results
from benchmarks.mixture_fit import figures
from vmf_heads.mixture import VMFMixture, fit_vmf_mixture, vmf_concentration

EM, ONLINE, K_MEANS, TRUTH = "EM", "online EM, batches of 4096", "k-means, then vMF", "the true mixture"


@dataclass(frozen=True)
class Problem:
    """A mixture of random directions, kappa spread evenly on a logarithmic scale, weights from 1 to 5, and its fits."""

    name: str
    components: int
    rows: int
    dim: int
    kappa: tuple[float, float]
    seeds: int
    passes: int  # at most, of EM and of k-means
    online_passes: int

    def truth(self, generator: torch.Generator) -> VMFMixture:
        """The mixture that rows are drawn from."""
        low, high = np.log10(self.kappa)
        order = torch.randperm(self.components, generator=generator)
        return VMFMixture(
            1 + 4 * torch.rand(self.components, generator=generator),
            torch.randn(self.components, self.dim, generator=generator),
            torch.logspace(low, high, self.components)[order],
        )


SMALL = Problem("K = 32, N = 20 000, p = 64", 32, 20_000, 64, (30, 600), seeds=5, passes=100, online_passes=10)
LARGE = Problem("K = 1024, N = 100 000, p = 256", 1024, 100_000, 256, (100, 2000), seeds=1, passes=10, online_passes=2)


def mixture_fit(*, large: bool = False, threads: int = 2) -> None:
    """Fit mixtures of known truth from one k-means++ start each, and score fresh rows under the fits.

    Writes benchmarks/results/mixture_fit_cpu_*.json, the table of docs/mixture.md, and two pictures in docs/images.

    Args:
        large: also K = 1024, N = 100 000, p = 256, which takes some minutes; without it an earlier figure stays.
        threads: CPU threads.
    """
    from benchmarks.mixture_docs import update_docs  # it imports the tables of all benchmarks of that page

    torch.set_num_threads(threads)
    rows = measure(SMALL)
    if large:
        rows += measure(LARGE)
    else:
        rows += kept_rows(LARGE)
    print(results.write("mixture_fit", "cpu", rows))
    figures.draw(SMALL.truth(torch.Generator().manual_seed(0)), SMALL.rows)
    update_docs()


def kept_rows(problem: Problem) -> list[dict[str, Any]]:
    """What the newest result file says of this problem."""
    try:
        return [row for row in results.latest("mixture_fit")["rows"] if row["problem"] == problem.name]
    except FileNotFoundError:
        return []


def measure(problem: Problem) -> list[dict[str, Any]]:
    """One row per method and seed. Seconds are those of the CPU, of all threads together, without the start."""
    rows = []
    for seed in tqdm(range(problem.seeds), desc=problem.name):
        generator = torch.Generator().manual_seed(seed)
        truth = problem.truth(generator)
        features, fresh = truth.sample(problem.rows, generator)[0], truth.sample(10_000, generator)[0]
        began = time.process_time()
        start = fit_vmf_mixture(features, problem.components, max_iterations=1, seed=seed).mixture
        start_seconds = time.process_time() - began
        contenders: dict[str, Callable[[], VMFMixture]] = {
            EM: partial(em, features, start, problem.passes),
            ONLINE: partial(em, features, start, problem.online_passes, batch_size=4096),
            K_MEANS: partial(k_means, features, start, problem.passes),
            TRUTH: partial(VMFMixture.to, truth, torch.float32),
        }
        for method, fit in contenders.items():
            began = time.process_time()
            mixture = fit()
            rows.append(
                {
                    "problem": problem.name,
                    "method": method,
                    "seed": seed,
                    "cpu_seconds": round(time.process_time() - began, 1),
                    "start_cpu_seconds": round(start_seconds, 1),
                    "fitted": round(mixture.log_prob(features).mean().item(), 4),
                    "fresh": round(mixture.log_prob(fresh).mean().item(), 4),
                    "kappa_error": round(kappa_error(mixture, truth), 4),
                }
            )
            tqdm.write(str(rows[-1]))
    return rows


def em(features: Tensor, start: VMFMixture, passes: int, **options: Any) -> VMFMixture:
    """Ours from this start."""
    return fit_vmf_mixture(features, start.num_components, init=start, max_iterations=passes, **options).mixture


def k_means(features: Tensor, start: VMFMixture, passes: int) -> VMFMixture:
    """scikit-learn's k-means on the unit vectors from this start; each cluster becomes a component.

    Its distance orders points like the cosine as long as its centres, the means, have about one length. The likelihood
    would be infinite for a cluster of one point: kappa has the bound that the EM fits have.
    """
    found = KMeans(start.num_components, init=start.directions.numpy(), n_init=1, max_iter=passes).fit(features.numpy())
    one_hot = F.one_hot(torch.from_numpy(found.labels_).long(), start.num_components).to(features)
    total, count = one_hot.T @ features, one_hot.sum(0)
    bound = fit_vmf_mixture(features, 1, max_iterations=1).max_kappa
    kappa = vmf_concentration((total.norm(dim=1) / count).clamp(max=1), features.shape[1]).clamp(max=bound)
    return VMFMixture(count, total, kappa)


def kappa_error(mixture: VMFMixture, truth: VMFMixture) -> float:
    """The median relative error of kappa: of each true component, beside the fitted one of the nearest direction."""
    nearest = (truth.directions @ mixture.directions.T).argmax(1)
    return (mixture.kappa[nearest] / truth.kappa - 1).abs().median().item()


def table(result: dict[str, Any]) -> str:
    """Mean and, over several seeds, standard deviation of each figure."""
    lines = ["| problem | method | CPU seconds | nats per row fitted | nats per fresh row | median error of κ |"]
    lines.append("|" + " --- |" * 6)
    for key in dict.fromkeys((row["problem"], row["method"]) for row in result["rows"]):
        own = [row for row in result["rows"] if (row["problem"], row["method"]) == key]
        cells = [_cell(own, name, digits) for name, digits in (("fitted", 2), ("fresh", 2))]
        error = f"{100 * float(np.mean([row['kappa_error'] for row in own])):.1f} %"
        time_taken = "" if key[1] == TRUTH else f"{np.mean([row['cpu_seconds'] for row in own]):.1f}"
        lines.append(f"| {key[0]} | {key[1]} | {time_taken} | {cells[0]} | {cells[1]} | {error} |")
    return "\n".join(lines)


def _cell(rows: list[dict[str, Any]], name: str, digits: int) -> str:
    values = np.array([row[name] for row in rows])
    spread = f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{spread}"
