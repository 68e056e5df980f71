"""The sets of images that are told apart, each as pictures in RGB: photographs, clothing, digits, and near sets."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.fashion import data as fashion
from data.images import CELL, Images, load_images, load_photo

OTHERS = ("cell.png", "clock_motion.png", "microaneurysms.png", "page.png", "text.png")
"""Pictures of scikit-image that are none of the photographs: two micrographs, a blurred clock, two scans of text."""
MOST = 2000
"""Of a set that is out of distribution, the first so many images."""

PHOTOGRAPHS, CLOTHING, DIGITS = "photographs", "Fashion-MNIST", "digits"
OTHER_PICTURES, UPSIDE_DOWN = "other pictures", "upside down"
NEAR = {PHOTOGRAPHS: OTHER_PICTURES, CLOTHING: UPSIDE_DOWN}
"""The near set of each kind of data; the other sets are far."""


def out_sets(inside: str, clothing: dict[str, fashion.Images]) -> dict[str, Sequence[Image.Image]]:
    """What is out of distribution for networks that were pretrained on `inside`, the near set first."""
    far = {DIGITS: pictures(load_images("digits", "test"))}
    if inside == PHOTOGRAPHS:
        return {OTHER_PICTURES: other_pictures()} | far | {CLOTHING: as_pictures(clothing["test"].x[:MOST])}
    near = as_pictures(clothing["test"].x[:MOST].flip(2))
    return {UPSIDE_DOWN: near} | far | {PHOTOGRAPHS: pictures(load_images("photos", "test"))}


def pictures(images: Images) -> list[Image.Image]:
    """The images without their labels."""
    return [images[index][0] for index in range(len(images))]


def other_pictures() -> list[Image.Image]:
    """Cells of OTHERS, as the photographs are cut; blank ones are left out in the same way."""
    cells = []
    for name in OTHERS:
        photo = load_photo(name)
        for y in range(0, photo.height - CELL + 1, CELL):
            for x in range(0, photo.width - CELL + 1, CELL):
                cell = photo.crop((x, y, x + CELL, y + CELL))
                if np.ptp(np.asarray(cell.convert("L"))) >= 8:
                    cells.append(cell)
    return cells


def as_pictures(x: Tensor) -> list[Image.Image]:
    """Fashion-MNIST's normalised tensors (N, 1, 28, 28) as pictures in RGB."""
    grey = (255 * (x[:, 0] * fashion.DEVIATION + fashion.MEAN)).round().clamp(0, 255).to(torch.uint8)
    return [Image.fromarray(image.numpy()).convert("RGB") for image in grey]


def as_tensors(images: Sequence[Image.Image]) -> Tensor:
    """Pictures as Fashion-MNIST's normalised tensors (N, 1, 28, 28): grey, and resized to 28 px."""
    grey = [np.asarray(image.convert("L").resize((28, 28), Image.Resampling.BICUBIC)) for image in images]
    return (torch.from_numpy(np.stack(grey)).float()[:, None] / 255 - fashion.MEAN) / fashion.DEVIATION
