"""Maximum-likelihood fits of mixtures of von Mises-Fisher distributions."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .._checks import at_least, positive
from .._distributed import all_reduce_sum_
from .._matmul import at_least_float32
from .._memory import rows_per_chunk
from ._ranks import gather_rows, rank_and_size
from ._seeding import starting_mixture
from ._split_merge import split_and_merge
from ._steps import distant_rows, expectation, maximisation
from .concentration import vmf_concentration
from .distribution import VMFMixture
from .online import OnlineEM

__all__ = ["MixtureFit", "fit_vmf_mixture"]

SEEDING_ROWS = 64  # per component: so many rows, drawn at random, are what the start is chosen from
MIN_ROWS = 2.0  # a component that explains less is empty
MOST_RESEEDINGS = 10  # passes of mini-batches after which empty components are moved; later ones leave them
COARSE = 10  # times the tolerance: what a pass still gains when components are split and merged
RELATIVE_DISPERSION = 1e-3  # of one component, beside that of all rows: the default bound of kappa
# How far the length of a row may be from 1.
LENGTH_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}


@dataclass(frozen=True, eq=False)
class MixtureFit:
    """What `fit_vmf_mixture` found."""

    mixture: VMFMixture
    log_likelihoods: list[float] = field(default_factory=list)  # nats per row, one of each pass
    converged: bool = False
    moved: int = 0  # how many components ended in another place, by split and merge or because they were empty
    max_kappa: float = math.inf  # the bound of kappa

    @property
    def log_likelihood(self) -> float:
        """Nats per row, of the last pass. Full batches: of `mixture`. Mini-batches: of each under what came before."""
        return self.log_likelihoods[-1]


@torch.no_grad()
def fit_vmf_mixture(
    features: Tensor,
    num_components: int,
    *,
    batch_size: int | None = None,
    max_iterations: int = 100,
    tolerance: float = 1e-4,
    max_kappa: float | None = None,
    split_merge_rounds: int = 10,
    init: VMFMixture | None = None,
    seed: int = 0,
    process_group: dist.ProcessGroup | None = None,
    progress: bool = False,
) -> MixtureFit:
    """Fit a mixture of von Mises-Fisher distributions to unit vectors by EM, with exact kappa and log-densities.

    With one component it equals SciPy's estimate, `scipy.stats.vonmises_fisher.fit`.

    Args:
        features: y (N, p), unit vectors, on any device; of each rank its own under torch.distributed. Memory beyond
            them is some megabytes and a few times (K, p): no tensor (N, K) exists.
        num_components: K, at most the number of rows.
        batch_size: None runs EM over all rows: the likelihood of no pass is below the one before, but after components
            were moved. A number runs online EM (`OnlineEM`) over shuffled batches of so many rows of each
            rank.
        max_iterations: passes over the data, at most.
        tolerance: stop when the mean log-likelihood of a pass is less than this above the one before, in nats.
        max_kappa: upper bound of every kappa, as the likelihood is infinite where a component holds one point alone.
            None: the kappa whose dispersion 1 - A_p(kappa) is a thousandth of that of all rows, 1 - ||mean of y||.
        split_merge_rounds: how often, at most, EM over all rows may leave a local maximum: where two components share
            what one could hold and a third holds what two could, the two become one and the third becomes two. A round
            that has not raised the likelihood when EM has converged again is taken back, with its passes. 0: never.
        init: where to start, instead of k-means++ on the sphere with one kappa for all components.
        seed: of all random choices: the same arguments give the same mixture on the same machine, on CUDA under
            `torch.use_deterministic_algorithms(True)`.
        process_group: the ranks that fit one mixture together; None: all of them, where torch.distributed runs. Every
            rank must call, and gets the same mixture. A pass, or a batch, takes one all-reduce.
        progress: show a bar; needs tqdm.

    Returns:
        A `MixtureFit` with the `mixture`, in float64 for float64 features, else in float32, and the `log_likelihoods`.

    Over all rows a component that explains hardly anything is merged with a neighbour. With mini-batches one that
    explains less than two rows is moved, after each of the first 10 passes that leave any, to a row drawn by the rule
    of k-means++ from those far from their component.

    Raises:
        TypeError: `features` is not a floating tensor.
        ValueError: an argument is out of its range, or rows of `features` are not unit vectors.
        ImportError: `progress=True` without tqdm.

    References: Banerjee et al., JMLR 6, 2005, section 4 (EM); Cappé and Moulines, JRSS B 71, 2009 (online EM); Arthur
    and Vassilvitskii, SODA 2007 (k-means++); Ueda et al., Neural Computation 12, 2000 (split and merge).

    >>> import torch
    >>> from vmf_heads.mixture import VMFMixture, fit_vmf_mixture
    >>> truth = VMFMixture(torch.tensor([0.7, 0.3]), torch.eye(16)[:2], torch.tensor([100.0, 30.0]))
    >>> features, _ = truth.sample(20_000, torch.Generator().manual_seed(0))
    >>> fit = fit_vmf_mixture(features, 2)
    >>> fit.converged
    True
    >>> torch.round(fit.mixture.weights, decimals=1), torch.round(fit.mixture.kappa, decimals=-1)
    (tensor([0.7000, 0.3000]), tensor([100.,  30.]))
    """
    count = at_least("num_components", num_components, 1)
    at_least("max_iterations", max_iterations, 1)
    at_least("split_merge_rounds", split_merge_rounds, 0)
    if batch_size is not None:
        at_least("batch_size", batch_size, 1)
    rows, dispersion = _check_features(features, process_group)
    if count > rows:
        raise ValueError(f"`num_components` (={count}) must be at most the number of rows of `features` (={rows})")
    if max_kappa is None:
        least = features.new_tensor(max(dispersion, 1e-6) * RELATIVE_DISPERSION, dtype=torch.float64)
        max_kappa = vmf_concentration(least, features.shape[1], complement=True).item()
    bound = positive("max_kappa", max_kappa)

    generator = torch.Generator().manual_seed(seed)
    if init is None:
        mixture = _start(features, count, bound, generator, process_group)
    elif (init.num_components, init.dim) != (count, features.shape[1]):
        raise ValueError(
            f"`init` (of {init.num_components} components in dimension {init.dim}) must have `num_components` "
            f"(={count}) components in the dimension of `features` (={features.shape[1]})"
        )
    else:
        mixture = init
    mixture = mixture.to(features.device, torch.float64 if features.dtype == torch.float64 else torch.float32)
    # From here on each rank draws for its own rows.
    generator.manual_seed(seed + 1 + rank_and_size(process_group)[0])
    passes = _Passes(max_iterations, progress)
    try:
        if batch_size is None:
            return _full_batch(
                features, mixture, bound, rows, tolerance, split_merge_rounds, passes, generator, process_group
            )
        return _mini_batch(features, mixture, bound, rows, batch_size, tolerance, passes, generator, process_group)
    finally:
        passes.close()


def _full_batch(
    features: Tensor,
    mixture: VMFMixture,
    max_kappa: float,
    rows: int,
    tolerance: float,
    split_merge_rounds: int,
    passes: _Passes,
    generator: torch.Generator,
    process_group: dist.ProcessGroup | None,
) -> MixtureFit:
    """Climb, leave the local maximum by splitting and merging, climb again; to the last digit only at the end."""

    def climb(start: VMFMixture, least_rise: float) -> MixtureFit:
        return _climb(features, start, max_kappa, rows, least_rise, passes, process_group)

    coarse = COARSE * tolerance
    best = climb(mixture, coarse if split_merge_rounds else tolerance)
    history, moved, converged = best.log_likelihoods, 0, best.converged and not split_merge_rounds
    for _ in range(split_merge_rounds):
        if passes.over:
            break
        start, moves = split_and_merge(best.mixture, features, rows, max_kappa, coarse, generator, process_group)
        if not moves:
            break
        found = climb(start, coarse)
        if found.log_likelihood <= best.log_likelihood:
            break
        best, history, moved = found, history + found.log_likelihoods, moved + moves
    if split_merge_rounds and not passes.over:
        best = climb(best.mixture, tolerance)
        history, converged = history + best.log_likelihoods[1:], best.converged
    return MixtureFit(best.mixture, history, converged, moved, max_kappa)


def _climb(
    features: Tensor,
    mixture: VMFMixture,
    max_kappa: float,
    rows: int,
    least_rise: float,
    passes: _Passes,
    process_group: dist.ProcessGroup | None,
) -> MixtureFit:
    """EM until a pass gains less than `least_rise`, or there are no passes left."""
    history: list[float] = []
    converged = False
    for last in passes:
        found = expectation(mixture, features, process_group)
        history.append(found.log_likelihood / rows)
        passes.show(history)
        converged = len(history) > 1 and history[-1] - history[-2] < least_rise
        if converged or last:
            break  # so that the last likelihood is that of the mixture
        mixture = maximisation(found, mixture, max_kappa)
    return MixtureFit(mixture, history, converged, max_kappa=max_kappa)


def _mini_batch(
    features: Tensor,
    mixture: VMFMixture,
    max_kappa: float,
    rows: int,
    batch_size: int,
    tolerance: float,
    passes: _Passes,
    generator: torch.Generator,
    process_group: dist.ProcessGroup | None,
) -> MixtureFit:
    online = OnlineEM(mixture, max_kappa=max_kappa, process_group=process_group)
    # As many batches on every rank, whatever their shares of the rows are.
    steps = max(1, rows // (rank_and_size(process_group)[1] * batch_size))
    history: list[float] = []
    converged, moved, reseedings = False, 0, 0
    for last in passes:
        order = torch.randperm(len(features), generator=generator).to(features.device)
        total = 0.0
        for step in range(steps):
            index = torch.arange(step * batch_size, (step + 1) * batch_size, device=features.device)
            batch = features[order[index % max(1, len(order))]] if len(order) else features
            total += online.update_(batch)
        history.append(total / steps)
        passes.show(history)
        empty = online.mixture.weights * rows < min(MIN_ROWS, rows / mixture.num_components / 2)
        if empty.any() and reseedings < MOST_RESEEDINGS and not last:
            places = distant_rows(online.mixture, features, generator, process_group)
            reseedings += 1
            moved += min(len(places), int(empty.sum()))
            online.reseed_(empty, places)
        elif len(history) > 1 and history[-1] - history[-2] < tolerance:
            converged = True
            break
    return MixtureFit(online.mixture, history, converged, moved, max_kappa)


def _check_features(features: Tensor, process_group: dist.ProcessGroup | None) -> tuple[int, float]:
    """The rows of all ranks, and their dispersion 1 - ||mean||."""
    got = features.dtype if isinstance(features, Tensor) else type(features).__name__
    if got not in LENGTH_TOLERANCE:
        raise TypeError(f"`features` (of {got}) must be a tensor of float16, bfloat16, float32 or float64")
    if features.dim() != 2 or features.shape[1] < 2:
        raise ValueError(f"`features` (of shape {tuple(features.shape)}) must have shape (N, p >= 2)")
    sums = torch.zeros(features.shape[1] + 1, dtype=torch.float64, device=features.device)
    for chunk in features.split(rows_per_chunk(features.shape[1], features.device)):
        rows = at_least_float32(chunk)
        lengths = torch.linalg.vector_norm(rows, dim=1)
        wrong = ~((lengths - 1).abs() <= LENGTH_TOLERANCE[features.dtype])
        if wrong.any():
            raise ValueError(
                f"`features` must have rows of length 1, but some have length {lengths[wrong][0].item():g}; "
                "`torch.nn.functional.normalize(features, dim=1)` makes them"
            )
        sums[0] += len(rows)
        sums[1:] += rows.sum(dim=0, dtype=torch.float64)
    all_reduce_sum_(sums, process_group)
    total = sums[0].item()
    return int(total), 1 - sums[1:].norm().item() / max(total, 1)


def _start(
    features: Tensor,
    count: int,
    max_kappa: float,
    generator: torch.Generator,
    process_group: dist.ProcessGroup | None,
) -> VMFMixture:
    """k-means++ over some rows of every rank; all ranks draw the same numbers."""
    rank, size = rank_and_size(process_group)
    wanted = max(1, SEEDING_ROWS * count // size)
    if len(features) > wanted:
        own = torch.Generator().manual_seed(generator.initial_seed() + rank)
        features = features[torch.randperm(len(features), generator=own)[:wanted].to(features.device)]
    points = gather_rows(at_least_float32(features), wanted, process_group)
    if len(points) < count:  # ranks of very different sizes
        raise ValueError(
            f"`num_components` (={count}) must be at most the rows that the start is chosen from (={len(points)}): "
            "spread the rows evenly over the ranks"
        )
    return starting_mixture(points, count, max_kappa, generator)


class _Passes:
    """Counts passes, says which one is the last, and shows a bar if that is wanted. A second loop goes on counting."""

    def __init__(self, count: int, progress: bool) -> None:
        self._count, self._done = count, 0
        self._bar: Any = None
        if progress:
            try:
                module = importlib.import_module("tqdm.auto")  # no dependency of the library
            except ImportError:
                raise ImportError("`progress` (=True) needs tqdm: pip install tqdm") from None
            self._bar = module.tqdm(total=count, desc="vMF mixture", unit="pass")

    @property
    def over(self) -> bool:
        """Whether there are no more."""
        return self._done == self._count

    def __iter__(self) -> Iterator[bool]:
        while not self.over:
            self._done += 1
            yield self.over

    def show(self, history: list[float]) -> None:
        """One more pass with this history of likelihoods."""
        if self._bar is not None:
            self._bar.set_postfix(nats=f"{history[-1]:.4f}")
            self._bar.update()

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()
