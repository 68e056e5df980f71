"""Images as fine-tuning sees them: strongly augmented one by one, then mixed within the batch."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from data.augment import random_resized_crop, to_tensor
from evaluators.finetune.rand_augment import rand_augment

Sample = tuple[int, int, int]
"""A sample is (epoch, index of an image, which of its repetitions)."""


class FinetuneTransform:
    """A crop of 8 to 100 % of the area, a flip, RandAugment and random erasing, as in DeiT and BEiT.

    Calling it with a PIL image in RGB and a `random.Random` gives a normalised float32 tensor (3, size, size).
    """

    def __init__(self, size: int, *, augment: bool = True, erase: float = 0.25) -> None:
        self.size, self.augment, self.erase = size, augment, erase

    def __call__(self, image: Image.Image, rng: random.Random) -> Tensor:
        """Return the image as it is trained on; the same state of `rng` gives the same."""
        image = random_resized_crop(image, self.size, (0.08, 1.0), rng)
        if rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.augment:
            image = rand_augment(image, rng)
        tensor = to_tensor(image)
        return erase_rectangle(tensor, rng) if rng.random() < self.erase else tensor


class FinetuneDataset(Dataset):
    """`dataset[sample]` is (image (3, size, size), label) and depends on the sample and `seed` alone."""

    def __init__(self, images: Sequence[tuple[Image.Image, int]], transform: FinetuneTransform, seed: int) -> None:
        self.images, self.transform, self.seed = images, transform, seed

    def __getitem__(self, sample: Sample) -> tuple[Tensor, int]:
        epoch, index, repetition = sample
        image, label = self.images[index]
        return self.transform(image, random.Random(f"{self.seed},{epoch},{index},{repetition}")), label


def sample_batches(images: int, batch_size: int, epochs: int, *, seed: int, repeats: int = 1) -> Iterator[list[Sample]]:
    """Yield the batches of all epochs, from the numbers alone; images that do not fill the last one of an epoch are
    left out.

    With repeated augmentation (Hoffer et al., 2020) an image comes `repeats` times in a row, and an epoch, which is as
    long as without, sees one of `repeats` images.
    """
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(images).tolist()
        samples = [(epoch, index, repetition) for index in order for repetition in range(repeats)]
        for first in range(0, images - batch_size + 1, batch_size):
            yield samples[first : first + batch_size]


def erase_rectangle(image: Tensor, rng: random.Random) -> Tensor:
    """Erase at random (Zhong et al., 2020): noise N(0, 1) in place of 2 to 33 % of `image` (3, H, W), sides 0.3 to 3.3.

    Returns `image`, changed in place; unchanged when none of ten rectangles fits.
    """
    _, height, width = image.shape
    for _ in range(10):
        area = height * width * rng.uniform(0.02, 1 / 3)
        ratio = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < h < height and 0 < w < width:
            y, x = rng.randint(0, height - h), rng.randint(0, width - w)
            generator = torch.Generator().manual_seed(rng.getrandbits(63))
            image[:, y : y + h, x : x + w] = torch.randn(len(image), h, w, generator=generator)
            break
    return image


def soft_targets(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """Return one-hot rows (B, classes) of `labels` (B,), of which every class gets an equal part of `smoothing`."""
    return (1 - smoothing) * F.one_hot(labels, classes).float() + smoothing / classes


def mix(images: Tensor, targets: Tensor, rng: random.Random, *, mixup: float, cutmix: float) -> tuple[Tensor, Tensor]:
    """Mix images (B, 3, H, W) and targets (B, classes) with those of the batch in reverse order.

    With equal chances Mixup (Zhang et al., 2018), which blends images, or CutMix (Yun et al., 2019), which pastes a
    rectangle; the share that an image keeps is drawn from Beta(a, a), once for the batch, a being `mixup` or `cutmix`.
    An `a` of 0 leaves that method out.
    """
    if mixup <= 0 and cutmix <= 0:
        return images, targets
    paste = rng.random() < 0.5 if mixup > 0 and cutmix > 0 else cutmix > 0
    share = rng.betavariate(cutmix, cutmix) if paste else rng.betavariate(mixup, mixup)
    if paste:
        height, width = images.shape[-2:]
        rows, columns = (_cut(side, math.sqrt(1 - share), rng) for side in (height, width))
        mixed = images.clone()
        mixed[:, :, rows, columns] = images.flip(0)[:, :, rows, columns]
        share = 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)
    else:
        mixed = images.flip(0).lerp(images, share)
    return mixed, targets.flip(0).lerp(targets, share)


def _cut(side: int, length: float, rng: random.Random) -> slice:
    # This is a part of about `length` of the side, around a point anywhere on it, cut off at the ends.
    centre, half = rng.randrange(side), int(side * length) // 2
    return slice(max(centre - half, 0), min(centre + half, side))
