"""Images whose random augmentation depends on nothing but the seed, the epoch and the index of the image."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset

Transform = Callable[[Image.Image, random.Random], Any]


class AugmentedImages(Dataset):
    """Item i is `transform(image_i, rng)` with a generator seeded by (seed, epoch, i) alone.

    So what a sample gets depends neither on the worker, the order, the number of ranks nor on a resumed run.
    """

    def __init__(self, images: Sequence[tuple[Image.Image, int]], transform: Transform, seed: int = 0) -> None:
        self.images, self.transform, self.seed = images, transform, seed
        # The number is in shared memory, so that workers which stay alive between epochs see a new value too.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        """The epoch that seeds the augmentations."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Draw other augmentations: call it before each epoch's loader is iterated."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        return self.augmented(self.images[index][0], index)

    def augmented(self, image: Image.Image, index: int) -> Any:
        """Return what the item at `index` would be if this were its image."""
        # A string seeds through SHA-512, the same in every process and version; hash() would not be.
        return self.transform(image, random.Random(f"{self.seed},{self.epoch},{index}"))
