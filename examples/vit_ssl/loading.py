"""From a recipe to batches of crops that depend on nothing but seed, epoch and image."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from augment import MultiCrop, MultiCropDataset
from config import Recipe


def multi_crop(recipe: Recipe) -> MultiCrop:
    """The augmentation of a recipe."""
    return MultiCrop(
        recipe.image_size,
        recipe.local_size,
        recipe.num_local_crops,
        global_scale=recipe.global_scale,
        local_scale=recipe.local_scale,
        color_strength=recipe.color_strength,
        blur_strength=recipe.blur_strength,
        solarize_prob=recipe.solarize_prob,
        grayscale_prob=recipe.grayscale_prob,
    )


def epoch_batches(images: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The batches of an epoch, from (seed, epoch) alone; images that do not fill a last batch are left out."""
    order = np.random.default_rng([seed, epoch]).permutation(images)
    return order[: images // batch_size * batch_size].reshape(-1, batch_size).tolist()


def load_batches(dataset: MultiCropDataset, batches: list[list[int]], num_workers: int) -> Iterable[list[Tensor]]:
    """One list of crops, (B, 3, h, w) each, for every list of indices."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # or each loader would draw from the global one, whose state is resumed
    )
