"""What every evaluator is fed, `features(split)`, and what it yields, `Metric`s."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm


class Features(NamedTuple):
    """The features of one split: `x` (N, D) float32 and `labels` (N,) int64 that index `classes`."""

    x: np.ndarray
    labels: np.ndarray
    classes: list[str]


class Metric(NamedTuple):
    """One number of an evaluation; accuracies lie in [0, 1]. `options` are the settings and notes behind it."""

    name: str
    value: float
    options: dict[str, Any] = {}  # noqa: RUF012 (never changed)
    predictions: np.ndarray | None = None  # (N,) predicted labels, for paired comparisons between features


FeaturesOf: TypeAlias = Callable[[str], Features]
"""Gives the features of a split by name; the train split is the bank or training set."""

Evaluator: TypeAlias = Callable[[FeaturesOf, str], Iterator[Metric]]
"""`evaluator(features, split)`: settings are chosen on val, the metrics are those of `split`."""


class _Transformed(Dataset):
    def __init__(self, images: Any, transform: Callable[[Any], Tensor]) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(self.images[index][0])


@torch.inference_mode()
def extract(
    encode: Callable[[Tensor], Tensor],
    images: Any,
    transform: Callable[[Any], Tensor],
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 256,
    num_workers: int = 0,
) -> Features:
    """Apply `encode`, batches (B, 3, h, w) -> (B, D), to a split of data.load_images, in its order."""
    loader = DataLoader(_Transformed(images, transform), batch_size=batch_size, num_workers=num_workers)
    bar = tqdm(loader, desc=f"features of {images.split}", unit="batch", leave=False)
    x = torch.cat([encode(batch.to(device)).float().cpu() for batch in bar])
    return Features(x.numpy(), images.labels, images.classes)
