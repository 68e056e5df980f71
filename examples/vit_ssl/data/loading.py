"""From a recipe to batches that depend on nothing but seed, epoch and image; each process loads its part of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, default_collate

from config.recipe import Recipe
from data.images import Images, load_images
from data.stream import ImageStream, StreamedViews, stream_batches
from data.unreadable import SubstitutedImages, Unreadable, collate
from data.views import build_views, finished_batch
from runtime.distributed import is_main, rank, world_size
from runtime.interruption import leave_process_group


def training_images(recipe: Recipe, data: Path | None, images_per_epoch: int | None) -> Images | ImageStream:
    """Return the train split of the recipe's data set; say on stderr what of a folder is left out.

    Raises ValueError when it does not fill a batch, or when `images_per_epoch` is given for a set of known length.
    """
    if recipe.dataset == "stream":
        if data is None:
            raise ValueError("`data` (=None) must be the name of an image set that `datasets` can stream")
        images: Images | ImageStream = ImageStream(str(data), images=images_per_epoch)
    elif images_per_epoch is not None:
        raise ValueError(f"`images_per_epoch` (={images_per_epoch}) is only for `dataset` 'stream'")
    else:
        images = load_images(recipe.dataset, "train", data=data)
    if len(images) < recipe.batch_size:
        raise ValueError(f"`batch_size` (={recipe.batch_size}) must be at most the number of images (={len(images)})")
    if isinstance(images, Images) and images.notes and is_main():
        print("\n  ".join([f"{data}:", *images.notes]), file=sys.stderr)
    return images


def micro_batch_size(recipe: Recipe, accumulate: int) -> int:
    """Return how many images one process takes at a time.

    Raises ValueError unless the recipe's batch is that many equal parts, and when MSN, whose regulariser looks at a
    whole batch, should see it in several.
    """
    if accumulate < 1:
        raise ValueError(f"`accumulate` (={accumulate}) must be at least 1")
    if recipe.method == "msn" and accumulate > 1:
        raise ValueError(f"`accumulate` (={accumulate}) must be 1 with `method` 'msn': me-max is of a whole batch")
    parts = world_size() * accumulate
    if recipe.batch_size % parts:
        raise ValueError(
            f"`batch_size` (={recipe.batch_size}) must be a multiple of {parts}: "
            f"{world_size()} processes x `accumulate` (={accumulate})"
        )
    return recipe.batch_size // parts


def load_steps(
    images: Images | ImageStream,
    recipe: Recipe,
    epoch: int,
    first: int,
    end: int,
    output: Path,
    *,
    accumulate: int,
    num_workers: int,
) -> Iterator[tuple[Any, ...]]:
    """Yield this process' `accumulate` micro-batches for each of the epoch's steps `first` to `end` - 1.

    `data.views.finished` makes the changes of their crops where the recipe has this done on the device.

    Images that cannot be read are listed in OUTPUT/unreadable.txt, and others take their places.
    """
    size = micro_batch_size(recipe, accumulate)
    views = build_views(recipe)
    collate_samples = finished_batch if recipe.augment_on == "cpu" else default_collate
    if isinstance(images, ImageStream):
        streamed = StreamedViews(
            images,
            views,
            seed=recipe.seed,
            epoch=epoch,
            batch_size=size,
            first=first * accumulate,
            last=end * accumulate,
            rank=rank(),
            world_size=world_size(),
        )
        batches: Iterable[Any] = stream_batches(streamed, num_workers, collate_samples)
    else:
        dataset = SubstitutedImages(images, views, recipe.seed)
        dataset.set_epoch(epoch)
        steps = epoch_batches(len(images), recipe.batch_size, recipe.seed, epoch)[first:end]
        loaded = load_batches(dataset, own_parts(steps, accumulate), num_workers, collate_samples)
        batches = Unreadable(images, output).batches(loaded)
    # zip takes the same iterator `accumulate` times, which gives tuples of consecutive micro-batches.
    return zip(*[iter(batches)] * accumulate, strict=True)


def epoch_batches(images: int, batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """Return the indices of an epoch (steps, batch_size), from (seed, epoch) alone; images that fill no batch are left
    out.
    """
    order = np.random.default_rng([seed, epoch]).permutation(images)
    return order[: images // batch_size * batch_size].reshape(-1, batch_size)


def own_parts(steps: np.ndarray, accumulate: int) -> list[list[int]]:
    """Return this process' micro-batches of these steps (S, batch_size): all processes' together are the batches."""
    parts = steps.reshape(len(steps), accumulate, world_size(), -1)
    return parts[:, :, rank()].reshape(len(steps) * accumulate, -1).tolist()


def load_batches(
    dataset: SubstitutedImages, batches: list[list[int]], num_workers: int, collate_samples: Callable[..., Any]
) -> Iterable[Any]:
    """Return the collated samples, and what could not be read, of every list of indices."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=partial(collate, collate_samples=collate_samples),
        num_workers=num_workers,
        worker_init_fn=leave_process_group,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # or each loader would draw from the global one
    )
