"""How well a score tells two sets of images apart, by OpenOOD's definitions, and how it ranks correct answers."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.stats import rankdata

RECALL = 0.95


class Separation(NamedTuple):
    """How well a score tells images of the data from others. Both numbers lie in [0, 1]."""

    auroc: float
    """The probability that an image of the data has the higher score, where equal scores count half."""
    fpr95: float
    """The share of the images of the data that are rejected when at least 95 % of the others are."""


def separation(inside: np.ndarray, outside: np.ndarray) -> Separation:
    """Return both measures of a score that is meant to be high for `inside` (N,) and low for `outside` (M,).

    As in OpenOOD (Zhang et al., 2023; `auc_and_fpr_recall` in its `openood/evaluators/metrics.py`) what is out of
    distribution is the positive class: the threshold of `fpr95` rejects 95 % of `outside`, and what it rejects of
    `inside` is falsely positive. In the first version of that file, and in many papers, it is the other way round: 95 %
    of `inside` are kept. The AUROC is the same either way. It is computed from ranks, so that ties are exact.

    Raises ValueError when a set is empty or a score is not finite.
    """
    for name, scores in {"inside": inside, "outside": outside}.items():
        if not len(scores) or not np.isfinite(scores).all():
            raise ValueError(f"`{name}` ({len(scores)} scores) must hold at least one score, and finite ones alone")
    ranks = rankdata(np.concatenate([inside, outside]))[: len(inside)]
    wins = ranks.sum() - len(inside) * (len(inside) + 1) / 2
    # The lowest threshold at which the share of `outside` that is rejected reaches 95 %.
    shares = np.arange(1, len(outside) + 1) / len(outside)
    threshold = np.sort(outside)[np.searchsorted(shares, RECALL)]
    return Separation(float(wins / (len(inside) * len(outside))), float(np.mean(inside <= threshold)))


def rank_correlation(scores: np.ndarray, correct: np.ndarray) -> float | None:
    """Return Spearman's correlation of scores (N,) with which answers are correct (N,); None where either is constant.

    Positive: images with a high score are answered correctly more often. Its size depends on how many are correct at
    all, so compare scores on the same answers.
    """
    if np.ptp(scores) == 0 or np.ptp(correct.astype(float)) == 0:
        return None
    return float(np.corrcoef(rankdata(scores), rankdata(correct))[0, 1])
