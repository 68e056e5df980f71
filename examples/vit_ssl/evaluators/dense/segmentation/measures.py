"""From scores of patches to labels of pixels, and how well these agree with a mask."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from evaluators.dense.segmentation.folder import VOID

VALUES = 2**26
"""Upsampled scores in memory at once: 256 MB."""


class Agreement(NamedTuple):
    """How well predicted labels agree with the true ones, over all labelled pixels of a data set."""

    miou: float
    """Mean of `iou`."""
    pixel_accuracy: float
    """The share of the pixels that have their label."""
    iou: dict[int, float]
    """Intersection over union of each label that is true or predicted of some pixel."""


def upsampled_labels(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the number of the class with the largest score at every pixel: (h, w, K) -> int64 (height, width) = size.

    Scores are enlarged bilinearly, a few classes at a time; of equal ones the first counts.
    """
    maps = scores.permute(2, 0, 1)[None]
    step = max(1, VALUES // (size[0] * size[1]))
    best = torch.full(size, -torch.inf, device=scores.device)
    labels = torch.zeros(size, dtype=torch.int64, device=scores.device)
    for first in range(0, maps.shape[1], step):
        some = F.interpolate(maps[:, first : first + step], size=size, mode="bilinear", align_corners=False)[0]
        value, label = some.max(dim=0)
        labels = torch.where(value > best, label + first, labels)
        best = torch.maximum(value, best)
    return labels


def confusion(truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Return how many pixels of label t are predicted as p, int64 (256, 256); those whose truth is VOID do not count.

    Both are uint8 (H, W). The sum over images is what `agreement` takes.
    """
    counts = np.bincount(256 * truth.ravel().astype(np.int64) + predicted.ravel(), minlength=256 * 256)
    counts = counts.reshape(256, 256)
    counts[VOID] = 0
    return counts


def agreement(counts: np.ndarray) -> Agreement:
    """Return mIoU and pixel accuracy from a confusion matrix, which must count a pixel.

    As in mmsegmentation, a label that is predicted somewhere but true nowhere has IoU 0, and one that is neither does
    not count.
    """
    right, union = counts.diagonal(), counts.sum(axis=0) + counts.sum(axis=1) - counts.diagonal()
    iou = {int(label): float(right[label] / union[label]) for label in np.flatnonzero(union)}
    return Agreement(float(np.mean(list(iou.values()))), float(right.sum() / counts.sum()), iou)
