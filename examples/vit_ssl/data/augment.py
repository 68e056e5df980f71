"""The augmentations of DINO and BYOL with PIL alone: multi-crop, colour jitter, blur, solarisation."""

from __future__ import annotations

import math
import random

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor

# The statistics of ImageNet, which every public DINO, iBOT and MSN backbone expects, as x -> x * scale + shift.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SCALE = 1 / (255 * np.array(STD, np.float32))
_SHIFT = -np.array(MEAN, np.float32) / np.array(STD, np.float32)

Range = tuple[float, float]

STRIP = 50
"""Evaluation cuts an image that is longer than so many times its width to that, before it resizes what is left."""


def to_tensor(image: Image.Image) -> Tensor:
    """Return an RGB image as a float32 tensor (3, height, width), normalised by ImageNet's mean and deviation."""
    return torch.from_numpy((np.asarray(image) * _SCALE + _SHIFT).transpose(2, 0, 1).copy())


def random_resized_crop(image: Image.Image, size: int, scale: Range, rng: random.Random) -> Image.Image:
    """Return a crop of a share `scale` of the area with aspect ratio 3:4 to 4:3, resized to `size` x `size` px
    (bicubic).
    """
    width, height = image.size
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(-1, 1) * math.log(4 / 3))
        w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if w <= width and h <= height:
            break
    else:  # no such crop found: the largest square, wherever the image is longer
        w = h = min(width, height)
    x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
    return image.resize((size, size), Image.Resampling.BICUBIC, box=(x, y, x + w, y + h))


class MultiCrop:
    """Global and local views of an image, augmented as in DINO (Caron et al., 2021) and BYOL.

    Calling it with a PIL image in RGB and a `random.Random` returns the views as normalised float32 tensors
    (3, size, size), the global ones first. All randomness comes from the generator.

    Args:
        global_size: side of the global views in px.
        local_size: side of the local views in px.
        num_local: number of local views.
        num_global: number of global views.
        global_scale: (low, high) share of the image's area that a global view shows, in (0, 1].
        local_scale: the same for the local views.
        color_strength: of the colour jitter. 1 is DINO's: brightness and contrast ± 40 %, saturation ± 20 %, hue ± 10 %
            of a full circle, for 80 % of the views. 0 is none, 2.5 the most that keeps factors positive.
        saturation: how far the saturation changes at strength 1, at most 0.4.
        blur_strength: multiplies the radii of DINO's Gaussian blur (0.1 to 2 px, meant for 224 px views); 0 is none.
        blur_prob: probabilities of the blur for the first global view, the other global ones and the local ones.
        solarize_prob: probability of inverting the bright half of the grey levels of the global views but the first.
        grayscale_prob: probability of dropping colour.

    Raises:
        ValueError: naming the argument that is out of its range.
    """

    def __init__(
        self,
        global_size: int = 224,
        local_size: int = 96,
        num_local: int = 8,
        *,
        num_global: int = 2,
        global_scale: Range = (0.4, 1.0),
        local_scale: Range = (0.05, 0.4),
        color_strength: float = 1.0,
        saturation: float = 0.2,
        blur_strength: float = 1.0,
        blur_prob: tuple[float, float, float] = (1.0, 0.1, 0.5),
        solarize_prob: float = 0.2,
        grayscale_prob: float = 0.2,
    ) -> None:
        sizes = [("global_size", global_size, 1), ("local_size", local_size, 1)]
        for name, size, low in [*sizes, ("num_global", num_global, 1), ("num_local", num_local, 0)]:
            if size < low:
                raise ValueError(f"`{name}` (={size}) must be at least {low}")
        for name, scale in [("global_scale", global_scale), ("local_scale", local_scale)]:
            if not 0 < scale[0] <= scale[1] <= 1:
                raise ValueError(f"`{name}` (={scale}) must be (low, high) with 0 < low <= high <= 1")
        for name, value, high in [
            ("color_strength", color_strength, 2.5),
            ("saturation", saturation, 0.4),
            ("blur_strength", blur_strength, math.inf),
            ("solarize_prob", solarize_prob, 1),
            ("grayscale_prob", grayscale_prob, 1),
        ]:
            if not 0 <= value <= high:
                raise ValueError(f"`{name}` (={value}) must be in [0, {high}]")
        if not all(0 <= probability <= 1 for probability in blur_prob):
            raise ValueError(f"`blur_prob` (={blur_prob}) must be three probabilities in [0, 1]")
        self.color_strength, self.saturation = color_strength, saturation
        self.blur_strength, self.grayscale_prob = blur_strength, grayscale_prob
        # A view has a size, a scale, and probabilities of blur and solarisation; the global views differ on purpose.
        first, others, local = blur_prob
        self._views = [(global_size, global_scale, first, 0.0)]
        self._views += [(global_size, global_scale, others, solarize_prob)] * (num_global - 1)
        self._views += [(local_size, local_scale, local, 0.0)] * num_local

    def __call__(self, image: Image.Image, rng: random.Random) -> list[Tensor]:
        """Return the views of `image`; the same state of `rng` gives the same views."""
        return [to_tensor(self._view(image, rng, *view)) for view in self._views]

    def _view(
        self, image: Image.Image, rng: random.Random, size: int, scale: Range, blur_prob: float, solarize_prob: float
    ) -> Image.Image:
        view = random_resized_crop(image, size, scale, rng)
        if rng.random() < 0.5:
            view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.color_strength and rng.random() < 0.8:
            view = color_jitter(view, self.color_strength, self.saturation, rng)
        if rng.random() < self.grayscale_prob:
            view = view.convert("L").convert("RGB")
        if self.blur_strength and rng.random() < blur_prob:
            view = view.filter(ImageFilter.GaussianBlur(self.blur_strength * rng.uniform(0.1, 2.0)))
        return ImageOps.solarize(view, 128) if rng.random() < solarize_prob else view


def color_jitter(image: Image.Image, strength: float, saturation: float, rng: random.Random) -> Image.Image:
    """Change brightness, contrast, saturation and hue by random amounts in random order.

    At strength 1 with a saturation of 0.2 it is DINO's.
    """
    changes = [(ImageEnhance.Brightness, 0.4), (ImageEnhance.Contrast, 0.4), (ImageEnhance.Color, saturation)]
    changes.append((None, 0.1))
    rng.shuffle(changes)
    for enhance, largest in changes:
        amount = strength * rng.uniform(-largest, largest)
        image = enhance(image).enhance(1 + amount) if enhance else turn_hue(image, amount)
    return image


def turn_hue(image: Image.Image, amount: float) -> Image.Image:
    """Turn the hue of an RGB image by `amount` of a full circle, to the nearest of PIL's 256 hues."""
    hue, saturation, value = image.convert("HSV").split()
    hue = Image.fromarray(np.asarray(hue) + np.uint8(round(amount * 256) % 256))  # uint8 wraps around, as hue does
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


class EvalTransform:
    """Resize and centre crop, as evaluations on ImageNet do: the shorter side to size / keep px, then size x size px.

    `keep=224/256` is their protocol; small images are used whole. The sizes are rounded as transformers' image
    processors round them, so that these give the same pixels.
    """

    def __init__(self, size: int, *, keep: float = 1.0) -> None:
        if size < 1:
            raise ValueError(f"`size` (={size}) must be at least 1")
        if not 0 < keep <= 1:
            raise ValueError(f"`keep` (={keep}) must be in (0, 1]")
        self.size, self.resized = size, round(size / keep)

    def __call__(self, image: Image.Image) -> Tensor:
        """Return the image as a normalised float32 tensor (3, size, size)."""
        short = min(image.size)
        if max(image.size) > STRIP * short:  # resized as a whole, it could take gigabytes
            width, height = (min(side, STRIP * short) for side in image.size)
            image = ImageOps.fit(image, (width, height))
        width, height = (int(self.resized * side / short) for side in image.size)
        x, y = (width - self.size) // 2, (height - self.size) // 2
        whole = image.resize((width, height), Image.Resampling.BICUBIC)
        return to_tensor(whole.crop((x, y, x + self.size, y + self.size)))
