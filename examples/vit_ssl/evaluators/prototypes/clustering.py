"""Clusters and classes: how well k-means on frozen features, and a head's own prototypes, agree with the labels."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.preprocessing import normalize

from evaluators.protocol import Evaluation, Metric, NotApplicable
from evaluators.prototypes.choices import choose
from evaluators.prototypes.components import Components, open_components
from runtime.shares import gather, share

MEASURES = {"nmi": normalized_mutual_info_score, "ari": adjusted_rand_score}


@dataclass(frozen=True)
class ClusteringOptions:
    """Agreement of clusters with the classes: of k-means on the features, and of the head's own prototypes."""

    clusters: tuple[int, ...] = ()
    """Numbers of clusters of k-means besides the number of classes and the number of prototypes in use."""
    seeds: int = 5
    """How often k-means starts anew; mean and deviation over these are reported."""
    images: int = 100_000
    """At most so many train images, drawn at random, are what clusters are fitted to."""
    normalizer: Literal["none", "vmf"] = "none"
    """Whether the head in a .pth file was trained with log C_p in the logits."""
    temperature: float = 0.1
    """The student's temperature with which the head in a .pth file was trained."""

    def __post_init__(self) -> None:
        for name in ("seeds", "images"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` (={getattr(self, name)}) must be at least 1")
        if min(self.clusters, default=2) < 2:
            raise ValueError(f"`clusters` (={self.clusters}) must be at least 2")


def clustering(evaluation: Evaluation, options: ClusteringOptions = ClusteringOptions()) -> Iterator[Metric]:
    """Yield `nmi_*` and `ari_*` of clusters that are found on the train split, over the images of the evaluated split.

    NMI is the mutual information of clusters and classes over the mean of their entropies, ARI the Rand index adjusted
    for chance; both are scikit-learn's. Chance alone raises NMI with the number of clusters, so compare equal numbers.

    - `*_kmeans`: k-means with as many clusters as there are classes, on features of length 1; a mean over the seeds.
    - `*_prototypes`: the cluster of an image is the prototype with its largest target (Eq. 7 with the centre), or with
      its largest logit (Eq. 6) where the centre is unknown. As many are counted as some train image chooses.
    - `*_kmeans@prototypes`: k-means with so many clusters.
    - `*_kmeans@N`: k-means with N of `clusters`.

    The k-means is scikit-learn's, with one start of k-means++ for each seed.

    Raises:
        NotApplicable: there are no two classes.
        ValueError: there are fewer train images than clusters.
    """
    train, queries = evaluation.features("train").at_most(options.images), evaluation.features(evaluation.split)
    classes = len(np.unique(train.labels))
    if classes < 2:
        raise NotApplicable("it needs images of at least two classes")
    numbers = {"kmeans": classes}
    components = _components(evaluation, options)
    if components is not None:
        by = "targets" if components.targets else "logits"
        chosen, own = (_prototypes(components, x, by) for x in (train.x, queries.x))
        numbers["kmeans@prototypes"] = used = len(np.unique(chosen))
        for measure, of in MEASURES.items():
            notes = {"clusters": used, "by": by}
            yield Metric(f"{measure}_prototypes", float(of(queries.labels, own)), notes)
    numbers |= {f"kmeans@{count}": count for count in options.clusters}
    if max(numbers.values()) > len(train.labels):
        given = f"`clusters` (={max(numbers.values())})"
        raise ValueError(f"{given} must be at most {len(train.labels)}, the number of train images")
    found = dict(_by_kmeans(train.x, queries.x, list(numbers.values()), options.seeds))
    for (name, count), (measure, of) in itertools.product(numbers.items(), MEASURES.items()):
        values = [float(of(queries.labels, found[count, seed])) for seed in range(options.seeds)]
        notes: dict[str, Any] = {"clusters": count, "seeds": options.seeds}
        notes |= {"sd": float(np.std(values, ddof=1))} if options.seeds > 1 else {}
        yield Metric(f"{measure}_{name}", float(np.mean(values)), notes)


def _by_kmeans(
    train: np.ndarray, queries: np.ndarray, counts: list[int], seeds: int
) -> Iterator[tuple[tuple[int, int], np.ndarray]]:
    """Yield ((clusters, seed), cluster of each query (N,)); the ranks share the fits."""
    fits = list(itertools.product(dict.fromkeys(counts), range(seeds)))
    fitted_to, asked = (normalize(x.astype(np.float32)) for x in (train, queries))
    found = [KMeans(count, n_init=1, random_state=seed).fit(fitted_to).predict(asked) for count, seed in share(fits)]
    yield from zip(fits, gather(found), strict=True)


def _components(evaluation: Evaluation, options: ClusteringOptions) -> Components | None:
    try:
        return open_components(evaluation, normalizer=options.normalizer, temperature=options.temperature)
    except NotApplicable:
        return None  # a backbone alone


def _prototypes(components: Components, x: np.ndarray, by: str) -> np.ndarray:
    return choose(components, x, np.arange(len(x))).prototypes[by].cpu().numpy()
