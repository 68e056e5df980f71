"""Crops: the multi-crop of DINO and BYOL, which changes colours and blurs, too, and the centre crop of evaluations."""

from __future__ import annotations

import math
import random

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from data.photometric import changed, draw_changes, normalized

Range = tuple[float, float]

STRIP = 50
"""Evaluation cuts an image that is longer than so many times its width to that, before it resizes what is left."""


WHOLE_PIXELS = 64
"""A box whose sides are that long or longer, in px, is rounded to whole pixels, as torchvision rounds every box."""


def to_tensor(image: Image.Image) -> Tensor:
    """Return an RGB image as a float32 tensor (3, height, width), normalised by ImageNet's mean and deviation."""
    return normalized(_pixels(image))


def _pixels(image: Image.Image) -> Tensor:
    """The pixels of an RGB image, uint8 (3, height, width)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def random_resized_crop(image: Image.Image, size: int, scale: Range, rng: random.Random) -> Image.Image:
    """Return a crop of a share `scale` of the area with aspect ratio 3:4 to 4:3, resized to `size` x `size` px
    (bicubic).
    """
    box = random_box(image, scale, rng)
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box)


def random_box(image: Image.Image, scale: Range, rng: random.Random) -> tuple[float, float, float, float]:
    """Return the left, upper, right and lower side of a crop that shows a share `scale` of the area."""
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
    return x, y, x + w, y + h


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
        self.num_global = num_global
        self._strengths = {
            "color_strength": color_strength,
            "saturation": saturation,
            "grayscale_prob": grayscale_prob,
            "blur_strength": blur_strength,
        }
        # A view has a size, a scale, and probabilities of blur and solarisation; the global views differ on purpose.
        first, others, local = blur_prob
        self._views = [(global_size, global_scale, first, 0.0)]
        self._views += [(global_size, global_scale, others, solarize_prob)] * (num_global - 1)
        self._views += [(local_size, local_scale, local, 0.0)] * num_local

    def __call__(self, image: Image.Image, rng: random.Random) -> list[Tensor]:
        """Return the views of `image`; the same state of `rng` gives the same views."""
        crops, changes = self.crops(image, rng)
        views: list[Tensor] = []
        for first, end in ((0, self.num_global), (self.num_global, len(crops))):
            if first < end:
                views += changed(torch.stack(crops[first:end]), torch.stack(changes[first:end]))
        return views

    def crops(self, image: Image.Image, rng: random.Random) -> tuple[list[Tensor], list[Tensor]]:
        """Return the crops (3, size, size), uint8, and what `data.photometric.changed` is to change in each of them."""
        pixels, crops, changes = torch.from_numpy(np.array(image)), [], []
        for size, scale, blur_prob, solarize_prob in self._views:
            crop = _resized(image, pixels, random_box(image, scale, rng), size)
            crops.append(crop.flip(2) if rng.random() < 0.5 else crop)
            changes.append(draw_changes(rng, blur_prob=blur_prob, solarize_prob=solarize_prob, **self._strengths))
        return crops, changes


def _resized(image: Image.Image, pixels: Tensor, box: tuple[float, float, float, float], size: int) -> Tensor:
    """A box of an image, whose `pixels` are (height, width, 3), as uint8 (3, size, size)."""
    x, y, right, low = box
    if min(right - x, low - y) < WHOLE_PIXELS:
        return _pixels(image.resize((size, size), Image.Resampling.BICUBIC, box=box))
    # The same filter as PIL's, and faster, but for whole pixels alone.
    part = pixels[round(y) : round(low), round(x) : round(right)].permute(2, 0, 1)[None]
    return F.interpolate(part, (size, size), mode="bicubic", antialias=True)[0]


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
