"""RandAugment (Cubuk et al., 2020) with PIL, in the variant that DeiT and BEiT train with: rand-m9-mstd0.5-inc1.

The fifteen operations, their probability and their ranges are those of that variant. Two things are simpler: geometric
operations always interpolate bicubically, and posterising leaves at least one bit.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from PIL import Image, ImageEnhance, ImageOps

FILL = (124, 116, 104)
"""What lies outside the image is filled with ImageNet's mean colour."""

BICUBIC = Image.Resampling.BICUBIC

Operation = Callable[[Image.Image, float, float], Image.Image]
"""An operation makes an image of (image, strength in [0, 1], sign -1 or 1)."""


def rand_augment(
    image: Image.Image, rng: random.Random, *, count: int = 2, magnitude: float = 9.0, spread: float = 0.5
) -> Image.Image:
    """Draw `count` operations and apply each with probability 1/2, at a strength of N(magnitude, spread) / 10."""
    for operation in rng.choices(list(OPERATIONS.values()), k=count):
        if rng.random() < 0.5:
            strength = min(max(rng.gauss(magnitude, spread), 0.0), 10.0) / 10
            image = operation(image, strength, rng.choice((-1.0, 1.0)))
    return image


def _affine(image: Image.Image, *coefficients: float) -> Image.Image:
    # Pixel (x, y) of the result is (a x + b y + c, d x + e y + f) of the image.
    return image.transform(image.size, Image.Transform.AFFINE, coefficients, BICUBIC, fillcolor=FILL)


def _solarize_add(image: Image.Image, strength: float) -> Image.Image:
    levels = [min(level + int(110 * strength), 255) if level < 128 else level for level in range(256)]
    return image.point(levels * 3)


def _enhance(enhancer: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    return lambda image, strength, sign: enhancer(image).enhance(1 + sign * 0.9 * strength)


OPERATIONS: dict[str, Operation] = {
    "auto-contrast": lambda image, strength, sign: ImageOps.autocontrast(image),
    "equalize": lambda image, strength, sign: ImageOps.equalize(image),
    "invert": lambda image, strength, sign: ImageOps.invert(image),
    "rotate": lambda image, strength, sign: image.rotate(sign * 30 * strength, BICUBIC, fillcolor=FILL),
    "posterize": lambda image, strength, sign: ImageOps.posterize(image, max(4 - int(4 * strength), 1)),
    "solarize": lambda image, strength, sign: ImageOps.solarize(image, 256 - int(256 * strength)),
    "solarize-add": lambda image, strength, sign: _solarize_add(image, strength),
    "color": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear-x": lambda image, strength, sign: _affine(image, 1, sign * 0.3 * strength, 0, 0, 1, 0),
    "shear-y": lambda image, strength, sign: _affine(image, 1, 0, 0, sign * 0.3 * strength, 1, 0),
    "shift-x": lambda image, strength, sign: _affine(image, 1, 0, sign * 0.45 * strength * image.width, 0, 1, 0),
    "shift-y": lambda image, strength, sign: _affine(image, 1, 0, 0, 0, 1, sign * 0.45 * strength * image.height),
}
