"""Fashion-MNIST: 70 000 grey images of clothing, 28 px, 10 classes; and the crops that DINO is trained on."""

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
"""Debian's package dataset-fashion-mnist puts the four files here."""
FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
VALIDATION = 10_000
"""The last 10 000 of the 60 000 training images are kept apart; settings are chosen on them."""
MEAN, DEVIATION = 0.286, 0.353
"""Of the grey values of all training images, from 0 to 1."""


@dataclass(frozen=True)
class Images:
    """One split: images (N, 1, 28, 28) of mean 0 and standard deviation 1, and their classes (N,)."""

    x: Tensor
    labels: Tensor


def load(folder: Path | None = None) -> dict[str, Images]:
    """The splits train (50 000), val (10 000) and test (10 000) from the four idx files in `folder`.

    None: from Debian's package, or else from the hub (`zalando-datasets/fashion_mnist`), which needs `datasets`.
    """
    return {split: _images(images, labels) for split, (images, labels) in load_arrays(folder).items()}


def load_arrays(folder: Path | None = None) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The same splits as they are stored: grey values (N, 28, 28) uint8, and classes (N,)."""
    if folder is None and not DEBIAN.is_dir():
        arrays = _from_hub()
    else:
        arrays = [_idx(folder or DEBIAN, name) for name in FILES]
    images, labels, test_images, test_labels = arrays
    first = len(images) - VALIDATION
    return {
        "train": (images[:first], labels[:first]),
        "val": (images[first:], labels[first:]),
        "test": (test_images, test_labels),
    }


def random_crops(x: Tensor, scale: tuple[float, float], generator: torch.Generator, *, strength: float) -> Tensor:
    """One crop per image of (N, 1, 28, 28), resized to 28 px: its area in `scale`, its aspect from 3/4 to 4/3.

    Half of them are mirrored; brightness and contrast change by up to `strength`.
    """
    uniform = torch.rand(6, len(x), generator=generator)
    area = scale[0] + (scale[1] - scale[0]) * uniform[0]
    aspect = ((uniform[1] * 2 - 1) * np.log(4 / 3)).exp()
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    affine = x.new_zeros(len(x), 2, 3)
    affine[:, 0, 0] = torch.where(uniform[2] < 0.5, width, -width)
    affine[:, 1, 1] = height
    affine[:, 0, 2] = (uniform[3] * 2 - 1) * (1 - width)
    affine[:, 1, 2] = (uniform[4] * 2 - 1) * (1 - height)
    crops = F.grid_sample(x, F.affine_grid(affine, list(x.shape), align_corners=False), align_corners=False)
    contrast = 1 + strength * (uniform[5] * 2 - 1)
    brightness = strength * (torch.rand(len(x), generator=generator) * 2 - 1)
    return crops * contrast[:, None, None, None] + brightness[:, None, None, None]


def _images(images: np.ndarray, labels: np.ndarray) -> Images:
    x = torch.from_numpy(images.astype(np.float32) / 255)[:, None]
    return Images((x - MEAN) / DEVIATION, torch.from_numpy(labels.astype(np.int64)))


def _idx(folder: Path, name: str) -> np.ndarray:
    """An array in the format of MNIST: its shape in big-endian 32-bit integers after a 4-byte magic number."""
    packed = folder / f"{name}.gz"
    content = gzip.decompress(packed.read_bytes()) if packed.exists() else (folder / name).read_bytes()
    dimensions = content[3]
    shape = np.frombuffer(content, ">i4", dimensions, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def _from_hub() -> list[np.ndarray]:
    import datasets

    arrays = []
    for split in ("train", "test"):
        rows = datasets.load_dataset("zalando-datasets/fashion_mnist", split=split)
        arrays += [np.stack([np.asarray(image) for image in rows["image"]]), np.array(rows["label"])]
    return arrays
