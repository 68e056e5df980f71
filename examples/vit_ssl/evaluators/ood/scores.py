"""All scores of a network's features, fitted to the train images alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from evaluators.ood.baselines import mahalanobis, neighbour_distance, probe_confidence
from evaluators.ood.density import OwnMixture, Scores, fit_mixture, mixture_scores, own_scores
from evaluators.protocol import Features

IN_WORDS = {
    "head_density": "log-density, the head's own mixture",
    "head_kappa": "κ of the winning component, the head's own mixture",
    "head_responsibility": "probability of the winning component, the head's own mixture",
    "mixture_density": "log-density, mixture fitted to the features",
    "mixture_kappa": "κ of the winning component, mixture fitted to the features",
    "knn": "distance to the k-th nearest neighbour",
    "mahalanobis": "Mahalanobis distance",
    "msp": "confidence of a linear probe (MSP)",
}
"""Every score by its name in results.jsonl. All are meant to be high for what is usual; distances are negated."""
HELD_OUT = 5
"""One in so many train images is held out where a setting is chosen."""


@dataclass(frozen=True)
class FittedScores:
    """A call returns the scores, by name and each (N,), of backbone features (N, D)."""

    parts: tuple[Callable[[np.ndarray], Scores], ...]
    notes: dict[str, dict[str, Any]]
    """By name of a score, the settings that were chosen for it."""

    def __call__(self, x: np.ndarray) -> Scores:
        """Return each score of each image."""
        return {name: values for part in self.parts for name, values in part(x).items()}


def fit_scores(
    train: Features, own: OwnMixture | None, *, k: int = 50, num_components: int | None = None
) -> FittedScores:
    """Fit every score that the data allow to the train images; whatever is chosen is chosen on a fifth of them.

    Args:
        train: features (N, D) of at least 10 images of the data. Without two classes of two images each there is no
            probe, and Mahalanobis distance has one class.
        own: the mixture of the network's head, where it has one.
        k: of the k-th nearest neighbour; all images where there are fewer.
        num_components: of the fitted mixture; None: the number that held-out images choose.

    Call it on all ranks, each of which then has the same scores.
    """
    count = len(train.labels)
    if count < 10:
        raise ValueError(f"`train` ({count} images) must hold at least 10 images")
    if k < 1:
        raise ValueError(f"`k` (={k}) must be at least 1")
    if num_components is not None and not 1 <= num_components <= count:
        raise ValueError(f"`num_components` (={num_components}) must be from 1 to {count}, the number of train images")
    held_out = held_out_rows(train.labels)
    mixture, of_mixture = fit_mixture(train.x, held_out, num_components)
    nearest, distance = neighbour_distance(train.x, min(k, count)), mahalanobis(train)
    parts: list[Callable[[np.ndarray], Scores]] = [
        lambda x: mixture_scores(mixture, x),
        lambda x: {"knn": nearest(x), "mahalanobis": distance(x)},
    ]
    notes = {"mixture_density": of_mixture, "mixture_kappa": of_mixture, "knn": {"k": min(k, count)}}
    if own is not None:
        parts.insert(0, lambda x: own_scores(own, x))
    if is_labelled(train.labels):
        confidence, notes["msp"] = probe_confidence(train, held_out)
        parts.append(lambda x: {"msp": confidence(x)})
    return FittedScores(tuple(parts), notes)


def is_labelled(labels: np.ndarray) -> bool:
    """Return whether there are two classes of at least two images each."""
    return int((np.bincount(labels) >= 2).sum()) >= 2


def held_out_rows(labels: np.ndarray) -> np.ndarray:
    """Return a mask (N,) of one image in HELD_OUT, drawn with a fixed seed and spread over the classes."""
    order = np.lexsort((np.random.default_rng(0).random(len(labels)), labels))
    mask = np.zeros(len(labels), bool)
    mask[order[HELD_OUT - 1 :: HELD_OUT]] = True
    return mask
