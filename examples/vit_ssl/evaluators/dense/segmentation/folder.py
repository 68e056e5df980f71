"""A folder of images, each with a mask whose pixels are the numbers of classes."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from data.augment import to_tensor
from data.files import open_image, open_rgb
from data.left_out import SUFFIXES, is_hidden, some
from evaluators.protocol import NotApplicable

VOID = 255
"""Label of pixels that never count."""
TREE = (
    "expected DATA/images/{train,val,test}/NAME.jpg and DATA/masks/{train,val,test}/NAME.png, a grey or indexed image "
    "whose pixels are the numbers of their classes"
)


class Pair(NamedTuple):
    """An image and its mask."""

    image: Path
    mask: Path


class Pairs(Dataset):
    """One split: `pairs[i]` is the image as a normalised tensor (3, size, size) and its mask, uint8 (H, W).

    Images are squeezed to a square, as in the evaluation of Balazevic et al. (2023); masks keep their size. Labels in
    `ignore` become `VOID`. A pair that cannot be used raises OSError, which says why.
    """

    def __init__(self, pairs: list[Pair], split: str, size: int, ignore: Collection[int] = ()) -> None:
        self.pairs, self.split, self.size, self.ignore = pairs, split, size, tuple(ignore)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        pair = self.pairs[index]
        image, mask = open_rgb(pair.image), read_mask(pair.mask, self.ignore)
        if image.size != mask.shape[::-1]:
            size = f"{image.width} x {image.height} px"
            raise OSError(f"cannot use the mask {str(pair.mask)!r}: it must be {size} like its image")
        return to_tensor(image.resize((self.size, self.size), Image.Resampling.BICUBIC)), torch.from_numpy(mask)


def load_pairs(data: Path | None, split: str) -> list[Pair]:
    """Return the images of a split, sorted by name, each with the mask of the same name, also in folders inside it.

    Raises:
        NotApplicable: `data` is no folder with `images` and `masks`.
        FileNotFoundError: there are no images of the split, or some lack their mask.
        ValueError: two images have one mask.
    """
    if data is None or not all((data / name).is_dir() for name in ("images", "masks")):
        given = "`data` (=None)" if data is None else f"`data` (={str(data)!r})"
        raise NotApplicable(f"{given} is no folder of images and masks: {TREE}")
    images, masks = data / "images" / split, data / "masks" / split
    names = [
        path.relative_to(images)
        for path in sorted(images.rglob("*"))
        if path.suffix.lower() in SUFFIXES and not any(map(is_hidden, path.relative_to(images).parts))
    ]
    if not names:
        raise FileNotFoundError(f"`data` (={str(data)!r}) has no images of the split {split!r}: {TREE}")
    pairs = [Pair(images / name, masks / name.with_suffix(".png")) for name in names]
    if lacking := [str(pair.image) for pair in pairs if not pair.mask.is_file()]:
        raise FileNotFoundError(f"{len(lacking)} of {len(pairs)} {split} images lack a mask ({some(lacking)}): {TREE}")
    if twice := len(pairs) - len({pair.mask for pair in pairs}):
        raise ValueError(
            f"{twice} of {len(pairs)} {split} images share their name, and so their mask, with another one"
        )
    return pairs


def read_mask(path: Path, ignore: Collection[int] = ()) -> np.ndarray:
    """Return the labels of the pixels of a mask, uint8 (H, W); those in `ignore` have become `VOID`.

    Raises OSError when the file is damaged, or holds colours or 16 bits instead of numbers of classes below 255.
    """
    image = open_image(path)
    if image.mode not in ("1", "L", "P"):
        raise OSError(f"cannot use the mask {str(path)!r}: it must be grey or indexed (mode L or P), not {image.mode}")
    labels = np.array(image, np.uint8)
    labels[np.isin(labels, tuple(ignore))] = VOID
    return labels
