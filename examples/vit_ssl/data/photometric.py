"""What DINO and BYOL change in crops besides their place: colour, blur, solarisation, in batches and on any device.

The changes of a crop are drawn one by one from its generator, and made for many crops at once. So a loader process can
make those of one image, or a GPU those of a whole batch, and the result is the same to rounding.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# The statistics of ImageNet, which every public DINO, iBOT and MSN backbone expects, as x -> x * scale + shift.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SCALE = 1 / (255 * torch.tensor(STD)[:, None, None])
_SHIFT = -torch.tensor(MEAN)[:, None, None] / torch.tensor(STD)[:, None, None]

# The changes of a crop are a row of numbers: three linear steps, each the factors of the pixel itself, of its grey
# level and of the mean grey level; how many of these come before the hue turns; by how much; and the other changes.
_STEPS, _HUE_AFTER, _HUE, _GREY, _SIGMA, _SOLARIZE = slice(0, 9), 9, 10, 11, 12, 13
_NEVER = -1.0
_NO_STEP = (1.0, 0.0, 0.0)

_IN_CACHE = 2**18
"""A CPU takes so many numbers at a time through all changes, which then stay in its cache: 1 MiB."""


def normalized(pixels: Tensor, out: Tensor | None = None) -> Tensor:
    """Return pixels (..., 3, height, width) from 0 to 255 as float32, normalised by ImageNet's mean and deviation."""
    return torch.mul(pixels, _SCALE.to(pixels.device), out=out).add_(_SHIFT.to(pixels.device))


def draw_changes(
    rng: random.Random,
    *,
    color_strength: float,
    saturation: float,
    grayscale_prob: float,
    blur_strength: float,
    blur_prob: float,
    solarize_prob: float,
) -> Tensor:
    """Return the changes of one crop (14,) float32, drawn from `rng`; `MultiCrop` says what the settings mean."""
    steps, hue_after, hue, sigma = [_NO_STEP] * 3, _NEVER, 0.0, 0.0
    if color_strength and rng.random() < 0.8:
        kinds = [("brightness", 0.4), ("contrast", 0.4), ("saturation", saturation), ("hue", 0.1)]
        rng.shuffle(kinds)
        steps = []
        for kind, largest in kinds:
            amount = color_strength * rng.uniform(-largest, largest)
            if kind == "hue":
                hue_after, hue = float(len(steps)), amount
            else:  # a blend with black, with the mean grey level, or with the grey level of each pixel
                steps.append((1 + amount, -amount * (kind == "saturation"), -amount * (kind == "contrast")))
    grey = rng.random() < grayscale_prob
    if blur_strength and rng.random() < blur_prob:
        sigma = blur_strength * rng.uniform(0.1, 2.0)
    solarize = rng.random() < solarize_prob
    return torch.tensor([*(factor for step in steps for factor in step), hue_after, hue, grey, sigma, solarize])


def changed(crops: Tensor, changes: Tensor) -> Tensor:
    """Return crops (N, 3, height, width), uint8 on any device, with their changes (N, 14) made, as normalised float32.

    The changes stay on the CPU, which decides by them what there is to do. What PIL and torchvision round to 8 bits
    after each change is rounded nowhere here.
    """
    out = torch.empty(crops.shape, device=crops.device)
    rows = max(1, _IN_CACHE // crops[0].numel()) if crops.device.type == "cpu" else len(crops)
    for part, wanted, place in zip(crops.split(rows), changes.split(rows), out.split(rows), strict=True):
        normalized(_changed(part.float(), wanted), out=place)
    return out


def _changed(x: Tensor, changes: Tensor) -> Tensor:
    steps = changes[:, _STEPS].unflatten(1, (3, 3, 1, 1, 1)).unbind(1)
    for number in range(4):
        x = _for_some(x, changes[:, _HUE_AFTER] == number, turn_hue, changes[:, _HUE])
        if number < 3 and (changes[:, 3 * number : 3 * number + 3] != torch.tensor(_NO_STEP)).any():
            x = _linear_step(x, *steps[number].to(x.device, non_blocking=True).unbind(1))
    x = _for_some(x, changes[:, _GREY] > 0, lambda some, _: _grey(some).repeat(1, 3, 1, 1), changes[:, _GREY])
    x = _for_some(x, changes[:, _SIGMA] > 0, blur, changes[:, _SIGMA])
    return _for_some(x, changes[:, _SOLARIZE] > 0, lambda some, _: torch.minimum(some, 255 - some), changes[:, _GREY])


def _for_some(x: Tensor, chosen: Tensor, change: Callable[[Tensor, Tensor], Tensor], amounts: Tensor) -> Tensor:
    """The crops x with `change` made in those that are `chosen`, a mask on the CPU."""
    if chosen.all():
        return change(x, amounts)
    if chosen.any():
        rows = chosen.nonzero()[:, 0]
        on_device = rows.to(x.device, non_blocking=True)
        x.index_copy_(0, on_device, change(x.index_select(0, on_device), amounts[rows]))
    return x


def _linear_step(x: Tensor, own: Tensor, grey: Tensor, mean: Tensor) -> Tensor:
    levels = _grey(x)
    offset = levels.mean((2, 3), keepdim=True).mul_(mean).add(levels.mul_(grey))
    return torch.addcmul(offset, x, own, out=x).clamp_(0, 255)


def _grey(x: Tensor) -> Tensor:
    """The grey levels (N, 1, height, width), weighted as PIL does."""
    red, green, blue = x.split(1, dim=1)
    return (red * 0.299).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def turn_hue(x: Tensor, amounts: Tensor) -> Tensor:
    """Return crops x (N, 3, height, width), float32 from 0 to 255, their hues turned by `amounts` of a circle.

    The hue is that of HSV: the largest and the smallest of the three numbers of a pixel stay what they are.
    """
    red, green, blue = x.unbind(1)
    high, low = x.amax(1), x.amin(1)
    chroma = high - low
    # A comparison that is written as numbers costs a tenth of `torch.where`.
    is_red, is_green = (torch.eq(channel, high, out=torch.empty_like(high)) for channel in (red, green))
    hue = torch.lerp((red - green).add_(chroma, alpha=4), (blue - red).add_(chroma, alpha=2), is_green)
    hue = torch.lerp(hue, green - blue, is_red).div_(chroma.clamp(min=1e-3)).div_(6)
    hue.add_(amounts.to(x.device, non_blocking=True)[:, None, None])
    turned = torch.empty_like(x)
    for channel in range(3):  # red is at 0 of the circle, green at a third, blue at two
        distance = hue - channel / 3
        distance.sub_(distance.round()).abs_()
        torch.addcmul(low, distance.mul_(-6).add_(2).clamp_(0, 1), chroma, out=turned[:, channel])
    return turned


def blur(x: Tensor, sigmas: Tensor) -> Tensor:
    """Return crops x (N, 3, height, width) with PIL's Gaussian blur; `sigmas` (N,), in px, are its radii."""
    weights = running_means(sigmas).to(x.device, non_blocking=True)[:, :, None, None, None]
    half = weights.shape[1] // 2
    for dim, padding in ((3, (half, half, 0, 0)), (2, (0, 0, half, half))):
        size = x.shape[dim]
        for _ in range(3):
            padded = F.pad(x, padding, mode="replicate")
            x = padded.narrow(dim, 0, size) * weights[:, 0]
            for place in range(1, 2 * half + 1):
                x.addcmul_(padded.narrow(dim, place, size), weights[:, place])
    return x


def running_means(sigmas: Tensor) -> Tensor:
    """Return the weights (N, 2 half + 1) of means over neighbours; three in a row are PIL's Gaussian blur of `sigmas`.

    The ends of a mean weigh less than its inner points, so that the variance of the three is exactly sigma^2 (Gwosdek
    et al., 2011). Points of a true Gaussian have that variance for large sigma only.
    """
    variance = sigmas.double()[:, None] ** 2 / 3
    whole = ((12 * variance + 1).sqrt() - 1).div(2).floor()  # inner points on either side
    ends = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    half = int(whole.max()) + 1
    distance = torch.arange(-half, half + 1).abs()
    weights = (distance <= whole).double() + (distance == whole + 1) * ends
    return (weights / weights.sum(1, keepdim=True)).float()
