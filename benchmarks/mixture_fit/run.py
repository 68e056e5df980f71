"""`python -m benchmarks mixture-fit`: fit_vmf_mixture and its peers on mixtures of known truth."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from sklearn.cluster import KMeans
from torch import Tensor
from tqdm import tqdm

from benchmarks import results
from benchmarks.mixture_fit import figures
from benchmarks.mixture_fit.spherecluster_process import spherecluster_em
from benchmarks.mixture_fit.textbook import textbook_em
from vmf_heads.mixture import VMFMixture, fit_vmf_mixture, vmf_concentration

EM, ONLINE, K_MEANS, TRUTH = "EM", "online EM, batches of 4096", "k-means, then vMF", "the true mixture"
PLAIN_EM, TEXTBOOK, SPHERECLUSTER = "EM without split and merge", "textbook EM", "spherecluster2"


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
    peer_passes: int  # M-steps of other programs for EM
    spherecluster: bool  # whether it is small enough for a program that loops over rows and components

    def truth(self, generator: torch.Generator) -> VMFMixture:
        """The mixture that rows are drawn from."""
        low, high = np.log10(self.kappa)
        order = torch.randperm(self.components, generator=generator)
        return VMFMixture(
            1 + 4 * torch.rand(self.components, generator=generator),
            torch.randn(self.components, self.dim, generator=generator),
            torch.logspace(low, high, self.components)[order],
        )


SMALL = Problem("K = 32, N = 20 000, p = 64", 32, 20_000, 64, (30, 600), 5, 100, 10, 40, spherecluster=True)
LARGE = Problem("K = 1024, N = 100 000, p = 256", 1024, 100_000, 256, (100, 2000), 1, 100, 2, 50, spherecluster=False)
PROBLEMS = {"small": SMALL, "large": LARGE}


@dataclass(frozen=True)
class Fit:
    """What a method found."""

    mixture: VMFMixture
    passes: int = 0
    cpu_seconds: float | None = None  # where the method has measured it itself


def mixture_fit(
    *,
    problems: tuple[Literal["small", "large"], ...] = ("small",),
    threads: int = 2,
    spherecluster: Path | None = None,
) -> None:
    """Fit mixtures of known truth from one k-means++ start each, and score fresh rows under the fits.

    Writes benchmarks/results/mixture_fit_cpu_*.json, the table of docs/mixture.md, and two pictures in docs/images.

    Args:
        problems: which to measure; large is K = 1024, N = 100 000, p = 256 and takes some minutes. Earlier figures of a
            problem that is left out stay.
        threads: CPU threads.
        spherecluster: the Python of an environment that has spherecluster2, to measure it, too.
    """
    from benchmarks.mixture_docs import update_docs  # it imports the tables of all benchmarks of that page

    torch.set_num_threads(threads)
    rows = [row for name, problem in PROBLEMS.items() if name not in problems for row in kept_rows(problem)]
    for name in problems:
        for row in measure(PROBLEMS[name], spherecluster):
            tqdm.write(str(row))
            rows = sorted([*rows, row], key=lambda row: [each.name for each in PROBLEMS.values()].index(row["problem"]))
            results.write("mixture_fit", "cpu", rows)  # so that a run that is interrupted leaves what it has found
    figures.draw(SMALL.truth(torch.Generator().manual_seed(0)), SMALL.rows)
    update_docs()


def kept_rows(problem: Problem) -> list[dict[str, Any]]:
    """What the newest result file says of this problem."""
    try:
        return [row for row in results.latest("mixture_fit")["rows"] if row["problem"] == problem.name]
    except FileNotFoundError:
        return []


def measure(problem: Problem, spherecluster: Path | None = None) -> Iterator[dict[str, Any]]:
    """One row per method and seed. Seconds are those of the CPU, of all threads together, without the start."""
    for seed in tqdm(range(problem.seeds), desc=problem.name):
        generator = torch.Generator().manual_seed(seed)
        truth = problem.truth(generator)
        features, fresh = truth.sample(problem.rows, generator)[0], truth.sample(10_000, generator)[0]
        began = time.process_time()
        first = fit_vmf_mixture(features, problem.components, max_iterations=1, seed=seed)
        start, start_seconds = first.mixture, time.process_time() - began
        contenders: dict[str, Callable[[], Fit]] = {
            EM: partial(em, features, start, problem.passes),
            PLAIN_EM: partial(em, features, start, problem.passes, split_merge_rounds=0),
            ONLINE: partial(em, features, start, problem.online_passes, batch_size=4096),
            K_MEANS: partial(k_means, features, start, problem.passes, first.max_kappa),
            TEXTBOOK: partial(textbook, features, start, problem.peer_passes, first.max_kappa),
        }
        if spherecluster is not None and problem.spherecluster:
            contenders[SPHERECLUSTER] = partial(sphere, spherecluster, features, start, problem.peer_passes)
        contenders[TRUTH] = partial(Fit, truth)
        for method, fit in contenders.items():
            began = time.process_time()
            found = fit()
            cpu_seconds = time.process_time() - began
            exact = found.mixture.to(torch.float64)
            yield {
                "problem": problem.name,
                "method": method,
                "seed": seed,
                "passes": found.passes,
                "cpu_seconds": round(cpu_seconds if found.cpu_seconds is None else found.cpu_seconds, 2),
                "start_cpu_seconds": round(start_seconds, 2),
                "fitted": round(exact.log_prob(features).mean().item(), 6),
                "fresh": round(exact.log_prob(fresh).mean().item(), 6),
                "kappa_error": round(kappa_error(exact, truth.to(torch.float64)), 4),
            }


def em(features: Tensor, start: VMFMixture, passes: int, **options: Any) -> Fit:
    """Ours from this start."""
    found = fit_vmf_mixture(features, start.num_components, init=start, max_iterations=passes, **options)
    return Fit(found.mixture, len(found.log_likelihoods))


def textbook(features: Tensor, start: VMFMixture, passes: int, max_kappa: float) -> Fit:
    """The oracle from this start."""
    return Fit(textbook_em(features, start, passes, max_kappa), passes)


def sphere(python: Path, features: Tensor, start: VMFMixture, passes: int) -> Fit:
    """spherecluster2 from this start."""
    mixture, cpu_seconds = spherecluster_em(python, features, start, passes)
    return Fit(mixture, passes, cpu_seconds)


def k_means(features: Tensor, start: VMFMixture, passes: int, max_kappa: float) -> Fit:
    """scikit-learn's k-means on the unit vectors from this start; each cluster becomes a component.

    Its distance orders points like the cosine as long as its centres, the means, have about one length. The likelihood
    would be infinite for a cluster of one point: kappa has the bound that the EM fits have.
    """
    found = KMeans(start.num_components, init=start.directions.numpy(), n_init=1, max_iter=passes).fit(features.numpy())
    labels = torch.from_numpy(found.labels_).long()
    count = torch.bincount(labels, minlength=start.num_components).to(features)
    total = torch.zeros_like(start.directions).index_add_(0, labels, features)
    kappa = vmf_concentration((total.norm(dim=1) / count).clamp(max=1), features.shape[1]).clamp(max=max_kappa)
    return Fit(VMFMixture(count, total, kappa), found.n_iter_)


def kappa_error(mixture: VMFMixture, truth: VMFMixture) -> float:
    """The median relative error of kappa: of each true component, beside the fitted one of the nearest direction."""
    nearest = (truth.directions @ mixture.directions.T).argmax(1)
    return (mixture.kappa[nearest] / truth.kappa - 1).abs().median().item()


def table(result: dict[str, Any]) -> str:
    """Likelihoods as means and, over several seeds, standard deviations; of the rest the medians over the seeds."""
    titles = ("problem", "method", "passes", "CPU seconds", "nats per row fitted", "minus EM's", "nats per fresh row")
    lines = ["| " + " | ".join(titles) + " | median error of κ |", "|" + " --- |" * 8]
    for key in dict.fromkeys((row["problem"], row["method"]) for row in result["rows"]):
        own = _rows(result, *key)
        beside = _rows(result, key[0], EM) if key[1] != EM else []
        differences = (
            [one["fitted"] - other["fitted"] for one, other in zip(own, beside, strict=True)] if beside else []
        )
        # One time that other work on the machine has lengthened does not move a median.
        passes, seconds, error = (
            float(np.median([row[name] for row in own])) for name in ("passes", "cpu_seconds", "kappa_error")
        )
        cells = [
            *key,
            "" if key[1] == TRUTH else f"{passes:.0f}",
            "" if key[1] == TRUTH else f"{seconds:.2g}" if seconds < 10 else f"{seconds:.0f}",
            _mean([row["fitted"] for row in own], ".2f"),
            _mean(differences, "+.4f") if differences else "",
            _mean([row["fresh"] for row in own], ".2f"),
            f"{100 * error:.1f} %",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _rows(result: dict[str, Any], problem: str, method: str) -> list[dict[str, Any]]:
    """By seed, in one order."""
    return [row for row in result["rows"] if (row["problem"], row["method"]) == (problem, method)]


def _mean(values: list[float], form: str) -> str:
    spread = f" ± {np.std(values, ddof=1):{form.removeprefix('+')}}" if len(values) > 1 else ""
    return f"{np.mean(values):{form}}".replace("-", "−") + spread
