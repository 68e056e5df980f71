"""What densities are compared with: distance to neighbours, Mahalanobis distance, confidence of a linear probe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.spatial.distance import cdist

from evaluators.knn import nearest_neighbours
from evaluators.linear.logistic_probe import fit_probe
from evaluators.protocol import Features

Score = Callable[[np.ndarray], np.ndarray]
"""Backbone features (N, D) -> a score (N,), high for what is usual."""

ROWS = 1024
"""So many images are scored at a time."""


def neighbour_distance(bank: np.ndarray, k: int) -> Score:
    """Return minus the distance to the k-th nearest of the bank (M, D), all vectors divided by their length.

    Reference: Sun et al., "Out-of-distribution detection with deep nearest neighbors", ICML 2022.
    """

    def score(x: np.ndarray) -> np.ndarray:
        found = nearest_neighbours(bank, [x[first : first + ROWS] for first in range(0, len(x), ROWS)], k)
        cosine = torch.cat([cosines[:, -1] for cosines, _ in found]).double().cpu().numpy()
        return -np.sqrt(np.maximum(2 - 2 * cosine, 0))

    return score


def mahalanobis(train: Features) -> Score:
    """Return minus the squared Mahalanobis distance to the nearest class mean, with one covariance for all classes.

    Where all images are of one class that is the distance to their mean. Directions in which features vary by less
    than the rounding of their dtype are left out: after a LayerNorm features have no variance in one of them. Only the
    features of the last layer are used, without the perturbation of the images.

    Reference: Lee et al., "A simple unified framework for detecting out-of-distribution samples and adversarial
    attacks", NeurIPS 2018.
    """
    classes, labels = np.unique(train.labels, return_inverse=True)
    x = train.x.astype(np.float64)
    means = np.stack([x[labels == label].mean(axis=0) for label in range(len(classes))])
    centred = x - means[labels]
    variances, axes = np.linalg.eigh(centred.T @ centred / len(x))
    kept = variances > (16 * np.finfo(train.x.dtype).eps) ** 2 * np.mean(x**2)
    whitening = axes[:, kept] / np.sqrt(variances[kept])
    centres = means @ whitening

    def score(x: np.ndarray) -> np.ndarray:
        chunks = (x[first : first + ROWS].astype(np.float64) @ whitening for first in range(0, len(x), ROWS))
        return np.concatenate([-cdist(chunk, centres, "sqeuclidean").min(axis=1) for chunk in chunks])

    return score


def probe_confidence(train: Features, held_out: np.ndarray) -> tuple[Score, dict[str, Any]]:
    """Return the largest probability that a logistic regression gives to a class (MSP), and how it was chosen.

    Its strength of regularisation is the one with the best accuracy on the rows of the mask `held_out` (N,), fitted to
    the others; then it is fitted to all.

    Reference: Hendrycks and Gimpel, "A baseline for detecting misclassified and out-of-distribution examples in neural
    networks", ICLR 2017.
    """
    rest, fresh = (Features(train.x[rows], train.labels[rows], train.classes) for rows in (~held_out, held_out))
    c = fit_probe(rest, fresh).notes["C"]
    probe = fit_probe(train, fresh, cs=(c,))
    return lambda x: probe.probabilities(x).max(axis=1).astype(np.float64), {"C": c}
