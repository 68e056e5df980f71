"""Measures of features, as numbers of arrays alone: how many dimensions they fill, and how well labels can be read."""

from __future__ import annotations

import numpy as np

from evaluators.protocol import Features

EPSILON = 1e-7
"""Added to every share in RankMe and LiDAR, as in their papers."""
DELTA = 1e-4
"""Added to the diagonal of LiDAR's scatter within images, as in its paper."""
ROUNDING = 1e-10
"""Eigenvalues below so much of the largest are rounding: of float32 features, in which a LayerNorm leaves no variance
along one direction."""
STRENGTHS = tuple(10.0**power for power in range(-1, 6))
"""Strengths of the ridge classifier's regularisation, of which leave-one-out on the train images chooses one."""


def rankme(x: np.ndarray) -> float:
    """Return RankMe of features (N, D), 1 to min(N, D): the exponential of the entropy of the singular values' shares.

    Garrido et al. (2023), "RankMe: assessing the downstream performance of pretrained self-supervised representations
    by their rank", Eqs. 1 and 2. The features are not centred. NaN where all of them are zero.

    Example: the identity matrix of 8 rows has 8 equal singular values.

        >>> round(rankme(np.eye(8)), 3)
        8.0
    """
    return _effective_number(np.sqrt(_squared_singular_values(x.astype(np.float64))))


def lidar(x: np.ndarray) -> float:
    """Return LiDAR of features (n, q, D) of q augmented views of n images each: 1 to about min(n - 1, D).

    Thilak et al. (2023), "LiDAR: sensing linear probing performance in joint embedding SSL architectures": the
    exponential of the entropy of the shares of the eigenvalues of Sw^-1/2 Sb Sw^-1/2. Sb is the covariance of the
    images' means, Sw the mean covariance of the views of an image, with `DELTA` added to its diagonal. So it counts
    dimensions that tell images apart, in units of what augmentation changes. NaN where all images are alike.

    Raises ValueError unless there are two images and two views at least.
    """
    if x.ndim != 3 or min(x.shape[:2]) < 2:
        raise ValueError(f"`x` (of shape {x.shape}) must be (n, q, D) with n and q at least 2")
    x = x.astype(np.float64)
    means = x.mean(axis=1)
    between, apart = means - means.mean(axis=0), (x - means[:, None]).reshape(-1, x.shape[2])
    sw = apart.T @ apart / len(apart) + DELTA * np.eye(x.shape[2])
    # B Sw^-1 B^T / n has the same eigenvalues but for zeros, where Sb = B^T B / n.
    found = np.linalg.eigvalsh(between @ np.linalg.solve(sw, between.T) / len(between))[::-1][: len(sw)]
    values = np.zeros(len(sw))
    values[: len(found)] = found.clip(min=0)
    return _effective_number(values)


def alpha_req(x: np.ndarray) -> float:
    """Return alpha-ReQ of features (N, D): alpha of the power law j^-alpha that the covariance's eigenvalues follow.

    Agrawal et al. (2022), "alpha-ReQ: assessing representation quality in self-supervised learning by measuring
    eigenspectrum decay": minus the slope of log eigenvalue over log j for the j-th largest of them. It is the least
    squares fit with weights 1/j (Stringer et al., 2019), in which every octave of j counts alike, over all eigenvalues
    above rounding. NaN where there are fewer than two.
    """
    x = x.astype(np.float64)
    eigenvalues = _squared_singular_values(x - x.mean(axis=0)) / len(x)
    eigenvalues = eigenvalues[eigenvalues > ROUNDING * eigenvalues.max(initial=0.0)]
    if len(eigenvalues) < 2:
        return float("nan")
    j = np.arange(1, len(eigenvalues) + 1)
    slope, _ = np.polyfit(np.log(j), np.log(eigenvalues), 1, w=np.sqrt(1 / j))  # its weights multiply residuals
    return -float(slope)


def feature_std(x: np.ndarray) -> float:
    """Return how far features (N, D) of unit length spread: 1 where they spread in all directions alike, 0 where all
    are the same.

    Chen and He (2021), "Exploring simple siamese representation learning", Section 4.1: the standard deviation of each
    coordinate of x / |x|, averaged, here times sqrt(D).
    """
    unit = x.astype(np.float64) / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    return float(unit.std(axis=0).mean() * np.sqrt(x.shape[1]))


def ridge_top1(bank: Features, queries: Features) -> float:
    """Return the top-1 accuracy in [0, 1] of a ridge classifier, trained on `bank`, on the queries.

    It is scikit-learn's RidgeClassifierCV on standardised features: least squares towards +1 for an image's class and
    -1 for the others, which has a closed form. The strength of its regularisation, one of `STRENGTHS`, is the one with
    the smallest leave-one-out error on the bank, so the queries choose nothing. NaN where the bank has one class only.
    (Written out, because the import of scikit-learn takes as long as several looks at small images.)
    """
    classes, index = np.unique(bank.labels, return_inverse=True)
    if len(classes) < 2:
        return float("nan")
    x, asked = bank.x.astype(np.float64), queries.x.astype(np.float64)
    mean, std = x.mean(axis=0), x.std(axis=0)
    std[std < 1e-7 * (1 + abs(mean))] = 1  # a coordinate that does not vary, but for rounding
    x, asked = (x - mean) / std, (asked - mean) / std
    if x.shape[0] < x.shape[1]:  # only the directions in which the bank varies matter
        basis, _ = np.linalg.qr(x.T)
        x, asked = x @ basis, asked @ basis
    targets = np.where(index[:, None] == np.arange(len(classes)), 1.0, -1.0)
    offset = targets.mean(axis=0)
    eigenvalues, vectors = np.linalg.eigh(x.T @ x)
    along = x @ vectors
    squared, moments = along**2, along.T @ (targets - offset)

    def left_out(strength: float) -> float:
        shrinkage = 1 / (eigenvalues + strength)
        leverage = 1 / len(x) + squared @ shrinkage  # of each image on its own fit, the intercept's included
        residuals = targets - offset - along @ (shrinkage[:, None] * moments)
        return float(np.mean((residuals / np.maximum(1 - leverage, 1e-12)[:, None]) ** 2))

    strength = min(STRENGTHS, key=left_out)
    scores = asked @ (vectors @ (moments / (eigenvalues + strength)[:, None])) + offset
    return float(np.mean(classes[scores.argmax(axis=1)] == queries.labels))


def _squared_singular_values(x: np.ndarray) -> np.ndarray:
    # From the largest down, as eigenvalues of the smaller one of x^T x and x x^T: several times as fast as those of x.
    # What is below rounding beside the largest may come out negative.
    gram = x.T @ x if x.shape[0] >= x.shape[1] else x @ x.T
    return np.linalg.eigvalsh(gram)[::-1].clip(min=0)


def _effective_number(values: np.ndarray) -> float:
    # exp of the entropy of the values' shares: n where n of them are equal and the others zero.
    if not values.sum() > 0:
        return float("nan")
    shares = values / values.sum() + EPSILON
    return float(np.exp(-np.sum(shares * np.log(shares))))
