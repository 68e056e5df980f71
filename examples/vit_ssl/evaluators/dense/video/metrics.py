"""Region similarity J and boundary accuracy F of masks, as the DAVIS challenges define them (Perazzi et al., 2016)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sklearn.neighbors import KDTree

TOLERANCE = 0.008
"""Boundaries match if they lie at most this share of the image's diagonal apart."""


def region_similarity(mask: np.ndarray, truth: np.ndarray) -> float:
    """Return J, the intersection over union of two boolean masks (H, W); 1 where both are empty."""
    union = np.count_nonzero(mask | truth)
    return np.count_nonzero(mask & truth) / union if union else 1.0


def boundary_accuracy(mask: np.ndarray, truth: np.ndarray, *, tolerance: float = TOLERANCE) -> float:
    """Return F, the harmonic mean of the precision and recall of the boundary of `mask`, both boolean (H, W).

    A boundary pixel is matched when the other boundary has one within `tolerance` times the diagonal, rounded up to
    whole pixels. 1 where neither mask has a boundary, 0 where only one has.
    """
    found, wanted = (np.argwhere(boundary(m)) for m in (mask, truth))
    if not len(found) or not len(wanted):
        return float(len(found) == len(wanted))
    radius = np.ceil(tolerance * np.hypot(*truth.shape))
    precision, recall = _matched(found, wanted, radius), _matched(wanted, found, radius)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def boundary(mask: np.ndarray) -> np.ndarray:
    """Return the pixels of a boolean mask (H, W) that differ from their neighbour to the right, below or below to the
    right.
    """
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return (mask != padded[:-1, 1:]) | (mask != padded[1:, :-1]) | (mask != padded[1:, 1:])


def _matched(points: np.ndarray, others: np.ndarray, radius: float) -> float:
    distance, _ = KDTree(others).query(points)
    return float(np.mean(distance <= radius))


def summarize(objects: Sequence[np.ndarray]) -> dict[str, float]:
    """Return the official numbers from J and F of each object in each of its frames: arrays (2, frames).

    "J-Mean", "F-Mean": over the frames, then over the objects; "J&F-Mean" is the mean of the two. "Recall" is the share
    of frames above 0.5, "Decay" what is lost from the first to the last quarter of the frames.
    """
    values = {}
    for row, measure in enumerate("JF"):
        values[f"{measure}-Mean"] = np.mean([of_object[row].mean() for of_object in objects])
        values[f"{measure}-Recall"] = np.mean([np.mean(of_object[row] > 0.5) for of_object in objects])
        values[f"{measure}-Decay"] = np.mean([_decay(of_object[row]) for of_object in objects])
    values = {"J&F-Mean": (values["J-Mean"] + values["F-Mean"]) / 2, **values}
    return {name: float(value) for name, value in values.items()}


def _decay(values: np.ndarray) -> float:
    # The official code cuts quarters that share their end points, with halves rounded up.
    ends = np.round(np.linspace(1, len(values), 5) + 1e-10).astype(int) - 1
    return np.mean(values[: ends[1] + 1]) - np.mean(values[ends[3] :])
