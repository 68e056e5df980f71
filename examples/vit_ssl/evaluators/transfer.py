"""Linear classification on small data sets (section 5.3 and A.6.3, after Ericsson et al., 2021)."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from tqdm import tqdm

from evaluators.protocol import Evaluation, Features, Metric
from runtime.distributed import is_main
from runtime.shares import gather, share

Score = Callable[[np.ndarray, np.ndarray], float]


@dataclass(frozen=True)
class TransferOptions:
    """Both accuracies are reported in any case; the paper's datasets are one --data folder and one command each."""

    metric: Literal["top1", "per_class"] = "top1"
    """What the strength is chosen by. Ericsson et al. take the mean accuracy per class for Aircraft, Caltech101,
    Flowers and Pets, top-1 for CIFAR10, CIFAR100, DTD, Food and SUN397."""
    selection: Literal["folds", "val"] = "folds"
    """Choose the strength by cross-validation over all that is trained on, as in the paper, or on the val split."""
    folds: int = 5
    """Parts of the cross-validation."""
    strengths: int = 45
    """How many strengths are tried, with logarithms evenly spaced from 1e-6 to 1e5."""
    max_iter: int = 100
    """Most iterations of L-BFGS for one strength, as in Ericsson et al.; each starts where the one before ended."""


class Search(NamedTuple):
    """The score of every strength, a mean over the parts, and how many solvers were cut short by `max_iter`."""

    scores: dict[float, float]
    cut_short: int

    def best(self) -> float:
        """Return the strength with the highest score, the strongest of equals."""
        return max(self.scores, key=lambda strength: (self.scores[strength], strength))


def transfer(evaluation: Evaluation, options: TransferOptions = TransferOptions()) -> Iterator[Metric]:
    """Yield the accuracy of a logistic regression on the [CLS] features as they are: "top1", and "per_class", the
    classes' mean.

    What is reported is never trained on: for the test split, training is on the train and val splits together (on train
    alone where there is no val split); for val on the train split. In the options, `trained_on` says which it was,
    `strength` is what was chosen, `converged` whether the last solver ended before `max_iter`, `cut_short` how many of
    the search did not.

    Raises ValueError when an option is out of range or a class has fewer images than there are folds.
    """
    _check(options)
    train, queries = evaluation.features("train"), evaluation.features(evaluation.split)
    val = _val(evaluation) if evaluation.split == "test" else None
    both = train if val is None else _joined(train, val)
    if options.selection == "folds":
        parts = folds(both, options.folds)
    elif val is not None:
        parts = [(np.arange(len(train.x)), np.arange(len(train.x), len(both.x)))]
    else:
        raise ValueError("`selection` (='val') must be 'folds' where there is no val split besides what is reported")
    strengths = np.logspace(5, -6, options.strengths).tolist()
    found = search(both, parts, strengths, SCORES[options.metric], max_iter=options.max_iter)
    stronger = [strength for strength in strengths if strength >= found.best()]
    *_, (_, classifier) = path(both.x, both.labels, stronger, max_iter=options.max_iter)
    predicted = classifier.predict(queries.x)
    notes = {
        "strength": found.best(),
        "cut_short": found.cut_short,
        "converged": bool(classifier.n_iter_.max() < options.max_iter),
        "selected_by": f"{options.metric}, {'val' if options.selection == 'val' else f'{options.folds} folds'}",
        "trained_on": "train" if val is None else "train+val",
        "score_by_strength": {f"{strength:.3g}": score for strength, score in found.scores.items()},
    }
    yield Metric("top1", top1(queries.labels, predicted), notes, predicted)
    yield Metric("per_class", per_class(queries.labels, predicted), notes)


def search(
    features: Features,
    parts: Sequence[tuple[np.ndarray, np.ndarray]],
    strengths: Sequence[float],
    score: Score,
    *,
    max_iter: int,
) -> Search:
    """Try every strength on every part, (rows to train on, rows to score); the ranks share the parts."""
    bar = tqdm(
        total=len(share(parts)) * len(strengths),
        desc="transfer",
        unit="fit",
        leave=False,
        mininterval=0.1 if sys.stderr.isatty() else 5,
        disable=not is_main(),
    )
    results = []
    for rows, held_out in share(parts):
        held_out_x, held_out_labels = features.x[held_out], features.labels[held_out]
        scores, cut_short = {}, 0
        for strength, classifier in path(features.x[rows], features.labels[rows], strengths, max_iter=max_iter):
            scores[strength] = score(held_out_labels, classifier.predict(held_out_x))
            cut_short += int(classifier.n_iter_.max() >= max_iter)
            bar.update()
        results.append((scores, cut_short))
    bar.close()
    results = gather(results)
    means = {strength: float(np.mean([scores[strength] for scores, _ in results])) for strength in results[0][0]}
    return Search(means, sum(cut_short for _, cut_short in results))


def path(
    x: np.ndarray, labels: np.ndarray, strengths: Sequence[float], *, max_iter: int
) -> Iterator[tuple[float, LogisticRegression]]:
    """Yield every strength, from the strongest to the weakest, with the classifier (one object) fitted at it to
    `x` (N, D).

    A strength multiplies ||W||^2 / 2 beside the summed cross-entropy: scikit-learn's 1 / C. Each solver starts where
    the one before ended and stops when no element of the sum's gradient is above 1e-4.
    """
    x = x.astype(np.float64)  # in float32 rounding hides what is left to gain, and the solver ends early
    # scikit-learn minimises the mean, in which thousands of images and hundreds of classes make small gradients.
    classifier = LogisticRegression(tol=1e-4 / len(x), max_iter=max_iter, warm_start=True)
    for strength in sorted(strengths, reverse=True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # counted instead
            classifier.set_params(C=1 / strength).fit(x, labels)
        yield strength, classifier


def folds(features: Features, number: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (rows to train on, rows to score) of a cross-validation with the same mixture of classes in every part.

    Raises ValueError when a class has fewer images than there are parts.
    """
    for name, count in zip(
        features.classes, np.bincount(features.labels, minlength=len(features.classes)), strict=True
    ):
        if count < number:
            raise ValueError(f"`folds` (={number}) must be at most {count}, the number of training images of {name!r}")
    return list(StratifiedKFold(number, shuffle=True, random_state=0).split(features.x, features.labels))


def top1(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Return the share of the images (N,) whose label is predicted."""
    return float(np.mean(labels == predicted))


def per_class(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Return the mean over the classes in `labels` (N,) of the share of their images whose label is predicted."""
    return float(np.mean([np.mean(predicted[labels == label] == label) for label in np.unique(labels)]))


SCORES: dict[str, Score] = {"top1": top1, "per_class": per_class}


def _val(evaluation: Evaluation) -> Features | None:
    try:
        return evaluation.features("val")
    except FileNotFoundError:  # the train split was there: the data set has no val split
        return None


def _joined(train: Features, val: Features) -> Features:
    x, labels = np.concatenate([train.x, val.x]), np.concatenate([train.labels, val.labels])
    return Features(x, labels, train.classes)


def _check(options: TransferOptions) -> None:
    for name, low in [("folds", 2), ("strengths", 1), ("max_iter", 1)]:
        if getattr(options, name) < low:
            raise ValueError(f"`{name}` (={getattr(options, name)}) must be at least {low}")
