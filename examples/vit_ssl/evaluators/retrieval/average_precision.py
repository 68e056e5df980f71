"""Average precision with junk images, as the revisited Oxford and Paris benchmarks have it (Radenovic et al., 2018)."""

from __future__ import annotations

import numpy as np


def positions(ranking: np.ndarray, positives: np.ndarray, junk: np.ndarray) -> np.ndarray:
    """Return where the positives stand in a ranking (N,) of image numbers, best first, when the junk is taken out.

    Ascending, counted from 0.
    """
    kept = ranking[~np.isin(ranking, junk)]
    return np.flatnonzero(np.isin(kept, positives))


def average_precision(positions: np.ndarray) -> float:
    """Return the area under the precision-recall curve by the trapezoid rule, from the `positions` of all positives.

    So each positive counts with the mean of the precision before and after it. scikit-learn's `average_precision_score`
    takes the one after it and is never smaller.
    """
    found = np.arange(len(positions))
    before = np.divide(found, positions, out=np.ones(len(positions)), where=positions > 0)
    after = (found + 1) / (positions + 1)
    return float(np.mean((before + after) / 2))


def precision_at(positions: np.ndarray, k: int) -> float:
    """Return the share of positives in the first `k` images, or up to the last positive where that comes earlier."""
    k = min(k, int(positions[-1]) + 1)
    return np.count_nonzero(positions < k) / k
