"""The few images that are looked at again and again while a run trains, and their features."""

from __future__ import annotations

import dataclasses
import random
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from config.recipe import Recipe
from data.augment import EvalTransform
from data.images import Images, load_images, share_kept
from data.views import multi_crop
from evaluators.features.extraction import assemble, extract
from evaluators.protocol import Features
from runtime.distributed import device

LEAST, SHARE, MOST = 400, 1 / 16, 2000
"""At most so many train images are looked at: a share of an epoch, so that a look costs little in proportion to it."""
VIEWS = 4
"""Augmented views of each image for LiDAR; as many views as there are images in the bank."""


class Sample(NamedTuple):
    """Fixed images of a run: the bank of train images, those of them for LiDAR, and validation images if there are."""

    bank: Images
    viewed: Images
    val: Images | None


def draw_sample(images: Images, recipe: Recipe, data: Path | None) -> Sample:
    """Return the images to look at, the same for every start of a run: they are drawn from the recipe's seed.

    Without validation images, or without classes, `val` is None.
    """
    size = min(MOST, max(LEAST, round(SHARE * len(images))))
    try:
        val = load_images(recipe.dataset, "val", data=data) if len(images.classes) > 1 else None
    except FileNotFoundError:  # there is no such split
        val = None
    bank = choose(images, size, recipe.seed)
    return Sample(bank, choose(bank, max(2, size // VIEWS), recipe.seed), val and choose(val, size, recipe.seed))


def choose(images: Images, size: int, seed: int) -> Images:
    """Return `size` of the images, or all of them, drawn at random from (seed, number of images) alone."""
    rows = np.sort(np.random.default_rng([seed, len(images)]).permutation(len(images))[:size])
    return dataclasses.replace(images, labels=images.labels[rows], items=_Chosen(images.items, rows))


def features(images: Images, encode: Callable[[Tensor], Tensor], recipe: Recipe) -> Features:
    """Return the features (N, D) of centre crops; the ranks share the work. Unreadable images are left out."""
    transform = EvalTransform(recipe.image_size, keep=share_kept(recipe.dataset, recipe.image_size))
    chunks = extract(encode, images, transform, device=device(), batch_size=64, quiet=True)
    return assemble(chunks, images)[0]


def features_of_views(images: Images, encode: Callable[[Tensor], Tensor], recipe: Recipe) -> np.ndarray:
    """Return the features (N, VIEWS, D) of augmented global crops, the same crops at each call."""
    crops = multi_crop(recipe, num_global=VIEWS, num_local=0)

    def views(image: Image.Image) -> Tensor:
        return torch.stack(crops(image, random.Random(zlib.crc32(image.tobytes()))))

    def encode_views(batch: Tensor) -> Tensor:
        return encode(batch.flatten(0, 1)).unflatten(0, (-1, VIEWS)).flatten(1)

    chunks = extract(encode_views, images, views, device=device(), batch_size=64 // VIEWS, quiet=True)
    x = assemble(chunks, images)[0].x
    return x.reshape(len(x), VIEWS, x.shape[1] // VIEWS)


class _Chosen(Sequence[Any]):
    """Some items of a sequence, which are read when they are asked for."""

    def __init__(self, items: Sequence[Any], rows: np.ndarray) -> None:
        self._items, self._rows = items, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return self._items[int(self._rows[index])]
