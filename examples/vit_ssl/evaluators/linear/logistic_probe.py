"""Linear probe: logistic regression on frozen, standardised features."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from evaluators.protocol import Features, Metric
from runtime.distributed import is_main

CS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)


@dataclass(frozen=True)
class Probe:
    """A fitted logistic regression, and how it was chosen."""

    scaler: StandardScaler
    classifier: LogisticRegression
    notes: dict[str, Any]

    def predict(self, x: np.ndarray) -> np.ndarray:
        """Return the labels (N,) of features (N, D)."""
        return self.classifier.predict(self.scaler.transform(_single(x)))

    def probabilities(self, x: np.ndarray) -> np.ndarray:
        """Return the probability of every class that was trained on (N, classes), of features (N, D)."""
        return self.classifier.predict_proba(self.scaler.transform(_single(x)))


def logistic_probe(
    train: Features, val: Features, queries: Features, *, cs: Sequence[float] = CS, max_iter: int = 1000
) -> Metric:
    """Return the top-1 accuracy on `queries` of the `fit_probe` of `train` and `val`."""
    probe = fit_probe(train, val, cs=cs, max_iter=max_iter)
    predicted = probe.predict(queries.x)
    return Metric("top1", float(np.mean(predicted == queries.labels)), probe.notes, predicted)


def fit_probe(train: Features, val: Features, *, cs: Sequence[float] = CS, max_iter: int = 1000) -> Probe:
    """Return a logistic regression trained on `train`.

    C (scikit-learn's inverse regularisation strength) is the one of `cs` with the best accuracy on val, the smallest
    of equals; the sweep goes upwards and ends when two in a row are worse than the best. `notes["converged"]` tells
    whether the solver ended before `max_iter`.
    """
    scaler = StandardScaler().fit(_single(train.x))
    inputs = scaler.transform(_single(train.x))
    # Starting each probe from the one before, with 1e-3, takes a third of the time on raw pixels of 14 classes. More
    # classes make smaller gradients, about 1 / classes at the start.
    tol = 1e-3 * min(1, 14 / len(train.classes))
    probe = LogisticRegression(max_iter=max_iter, tol=tol, warm_start=True)
    sweep: dict[float, float] = {}
    probes: dict[float, Probe] = {}
    shown = {"leave": False, "disable": not is_main(), "mininterval": 0.1 if sys.stderr.isatty() else 5}
    for c in tqdm(sorted(cs), desc="linear probes", unit="C", **shown):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            probes[c] = Probe(scaler, deepcopy(probe.set_params(C=c).fit(inputs, train.labels)), {})
        sweep[c] = float(np.mean(probes[c].predict(val.x) == val.labels))
        if max(list(sweep.values())[-2:]) < max(sweep.values()):
            break  # the weaker the regularisation, the longer a probe takes
    c = max(sweep, key=sweep.__getitem__)
    converged = bool(probes[c].classifier.n_iter_.max() < max_iter)
    notes = {"C": c, "converged": converged, "val_top1_by_C": {f"{c:g}": top1 for c, top1 in sweep.items()}}
    return Probe(scaler, probes[c].classifier, notes)


def _single(x: np.ndarray) -> np.ndarray:
    """Features may be kept in half precision, in which StandardScaler would compute."""
    return x.astype(np.float32, copy=False)
