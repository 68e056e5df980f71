"""Few labels: L2-regularised logistic regression on 1 and 5 images per class, as in MSN (Assran et al., 2022)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from sklearn.linear_model import LogisticRegression
from tqdm import tqdm

from evaluators.features import Features, FeaturesOf, Metric

# MSN minimises mean loss + 0.075 / n * |W|^2 / 2, scikit-learn C * sum of losses + |W|^2 / 2.
C = 1 / 0.075


def fewshot(features: FeaturesOf, split: str, *, shots: Sequence[int] = (1, 5), draws: int = 20) -> Iterator[Metric]:
    """Mean top-1 accuracy over `draws` fixed training sets of `shots` images per class, its spread in `options["sd"]`.

    Features are centred and L2-normalised row by row and the classifier has no intercept, as in MSN. Nothing is tuned.

    Raises:
        ValueError: a class has fewer images in the train split than a training set needs.
    """
    train, queries = features("train"), features(split)
    x, query_x = normalize(train.x), normalize(queries.x)
    for shot in shots:
        accuracies = []
        for number in tqdm(range(draws), desc=f"{shot}-shot", unit="draw", leave=False):
            chosen = draw(train, shot, number)
            predicted = fit(x[chosen], train.labels[chosen]).predict(query_x)
            accuracies.append(np.mean(predicted == queries.labels))
        options = {"sd": float(np.std(accuracies, ddof=1)) if draws > 1 else 0.0, "draws": draws, "C": C}
        yield Metric(f"{shot}-shot", float(np.mean(accuracies)), options)


def draw(train: Features, shots: int, number: int) -> np.ndarray:
    """Indices of `shots` images of every class, without repetition; the same for the same `shots` and `number`."""
    rng = np.random.default_rng([shots, number])
    chosen = []
    for label, name in enumerate(train.classes):
        members = np.flatnonzero(train.labels == label)
        if len(members) < shots:
            raise ValueError(f"class {name!r} has {len(members)} train images, but {shots}-shot needs at least {shots}")
        chosen.append(rng.choice(members, shots, replace=False))
    return np.concatenate(chosen)


def fit(x: np.ndarray, labels: np.ndarray) -> LogisticRegression:
    """MSN's classifier on normalised features (N, D)."""
    return LogisticRegression(C=C, fit_intercept=False, max_iter=1000).fit(x, labels)


def normalize(x: np.ndarray) -> np.ndarray:
    """Rows (N, D) with mean 0 and length 1."""
    x = x - x.mean(axis=1, keepdims=True)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
