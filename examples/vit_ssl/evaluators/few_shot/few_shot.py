"""Few labels: L2-regularised logistic regression on 1, 2 and 5 images per class, as in MSN (Assran et al., 2022)."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression
from tqdm import tqdm

from data.images import load_images
from evaluators.features.encoder import Encoder, final_norm
from evaluators.few_shot.splits import TrainingSet, drawn_sets, listed_sets
from evaluators.protocol import Evaluation, Features, Metric
from runtime.distributed import is_main
from runtime.shares import gather, share

GAP = 1e-5
"""The fit ends when the objective is at most so many nats above its minimum."""


@dataclass(frozen=True)
class FewShotOptions:
    """The defaults draw the training sets; Table 3 of the paper takes MSN's lists: --splits DIR --no-final-norm."""

    splits: Path | None = None
    """Folder with the lists of images that MSN publishes (its repository will do), for --data with ImageNet. They give
    three sets of 1, 2 and 5 images per class and one of 1 %; nothing is drawn then."""
    shots: tuple[int, ...] = (1, 2, 5)
    """Images per class."""
    percents: tuple[float, ...] = ()
    """Also draw sets of so many per cent of the images of every class."""
    draws: int = 20
    """How many sets are drawn for each size."""
    regularization: float = 0.075
    """Strength of the L2 penalty; see `fit`."""
    final_norm: bool = True
    """Take [CLS] after the final LayerNorm, as every other protocol does. MSN's script takes it before."""


def fewshot(evaluation: Evaluation, options: FewShotOptions = FewShotOptions()) -> Iterator[Metric]:
    """Yield the mean top-1 accuracy over the training sets of each size, and their standard deviation `options["sd"]`.

    Nothing is tuned. Metrics are called "1-shot", "2-shot", "5-shot" and, for shares of the train split, "1percent".

    Raises:
        ValueError: an option is out of range, a class has too few images, or a list does not fit the train split.
        FileNotFoundError: there are no lists.
    """
    _check(options)
    train, queries = evaluation.features("train"), evaluation.features(evaluation.split)
    if options.splits is None:
        sets = drawn_sets(train, shots=options.shots, percents=options.percents, draws=options.draws)
    else:
        sets = _listed_sets(evaluation, options.splits, train)
    query_x = _prepare(evaluation.encoder, queries.x, options)
    accuracies = []
    mininterval = 0.1 if sys.stderr.isatty() else 5
    bar = tqdm(share(sets), "few-shot", unit="set", leave=False, mininterval=mininterval, disable=not is_main())
    for chosen in bar:
        x = _prepare(evaluation.encoder, train.x[chosen.rows], options)
        classifier = fit(x, train.labels[chosen.rows], options.regularization)
        accuracies.append(float(np.mean(classifier.predict(query_x) == queries.labels)))
    accuracies = gather(accuracies)
    for name in dict.fromkeys(chosen.name for chosen in sets):
        those = [accuracy for accuracy, chosen in zip(accuracies, sets, strict=True) if chosen.name == name]
        notes = {"draws": len(those), "regularization": options.regularization, "final_norm": options.final_norm}
        if len(those) > 1:
            notes["sd"] = float(np.std(those, ddof=1))
        yield Metric(name, float(np.mean(those)), notes)


def fit(x: np.ndarray, labels: np.ndarray, regularization: float = 0.075) -> LogisticRegression:
    """Return MSN's classifier on prepared features (n, D): multinomial logistic regression without intercept.

    It minimises mean cross-entropy + regularization / n * ||W||^2 / 2 over W (classes, D), the objective that MSN's
    script hands to cyanure. scikit-learn minimises C * summed cross-entropy + ||W||^2 / 2, so C is 1 / regularization.
    For two classes it has one vector w = W_1 - W_0, whose best split, W_1 = -W_0, has half the penalty: C doubles.
    """
    classes = len(np.unique(labels))
    c = (2 if classes == 2 else 1) / regularization
    # The objective is strongly convex with constant m = 1 / (c n), so where no element of its gradient is above tol, it
    # is at most classes D tol^2 / 2 m above its minimum: GAP. scikit-learn's own tol stops many classes at once.
    tol = (2 * GAP / (c * len(x)) / (classes * x.shape[1])) ** 0.5
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The number of unique classes", UserWarning)  # one image of each
        return LogisticRegression(C=c, tol=tol, fit_intercept=False, max_iter=1000).fit(x.astype(np.float64), labels)


def normalize(x: np.ndarray) -> np.ndarray:
    """Return the rows (N, D) with mean 0 and length 1, as MSN's script has them, in float32."""
    x = x.astype(np.float32)
    x -= x.mean(axis=1, keepdims=True)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def before_final_norm(encoder: Encoder, x: np.ndarray) -> np.ndarray:
    """Return the features (N, D) as they were before the final LayerNorm, up to the mean and length of each row."""
    norm = final_norm(encoder.model)
    weight, bias = (parameter.detach().float().cpu().numpy() for parameter in (norm.weight, norm.bias))
    return (x - bias) / weight


def _prepare(encoder: Encoder | None, x: np.ndarray, options: FewShotOptions) -> np.ndarray:
    if options.final_norm:
        return normalize(x)
    if encoder is None or not encoder.has_patches:
        raise ValueError("`final_norm` (=False) must be True where no LayerNorm of a vision transformer comes last")
    return normalize(before_final_norm(encoder, x))


def _listed_sets(evaluation: Evaluation, splits: Path, train: Features) -> list[TrainingSet]:
    if evaluation.dataset is None:
        raise ValueError(f"`splits` (={str(splits)!r}) needs the folder of images that its lists are about: --data")
    images = load_images(evaluation.dataset, "train", data=evaluation.data)
    if unreadable := len(images) - len(train.labels):
        raise ValueError(f"`splits` (={str(splits)!r}) needs all train images, but {unreadable} could not be read")
    return listed_sets(splits, images)


def _check(options: FewShotOptions) -> None:
    if options.draws < 1:
        raise ValueError(f"`draws` (={options.draws}) must be at least 1")
    if min(options.shots, default=1) < 1:
        raise ValueError(f"`shots` (={options.shots}) must be at least 1")
    if not all(0 < percent <= 100 for percent in options.percents):
        raise ValueError(f"`percents` (={options.percents}) must be in (0, 100]")
    if options.regularization <= 0:
        raise ValueError(f"`regularization` (={options.regularization}) must be positive")
