"""Which patches of a view are hidden: iBOT's and BEiT's blocks, and MSN's random drop."""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor

ASPECT_RATIOS = (0.3, 1 / 0.3)
"""The height over the width of a block is drawn log-uniformly from this range."""


def block_mask(height: int, width: int, ratio: float, rng: random.Random) -> Tensor:
    """Return a mask (height, width) bool of rectangles of patches that together hide at most a share `ratio` of a view.

    As in BEiT (Bao et al., 2022) and iBOT (Zhou et al., 2022): rectangles are added until the share is reached or ten
    draws in a row do not fit. Each covers at least a ninth of the square of the shorter side where that much is left,
    and neither the full height nor the full width.
    """
    mask = torch.zeros(height, width, dtype=torch.bool)
    left = ratio * height * width
    smallest = (min(height, width) // 3) ** 2
    while left > 0:
        for _ in range(10):
            area = rng.uniform(smallest, left)
            aspect = math.exp(rng.uniform(*map(math.log, ASPECT_RATIOS)))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h >= height or w >= width:
                continue
            top, first = rng.randint(0, height - h), rng.randint(0, width - w)
            block = mask[top : top + h, first : first + w]
            hidden = h * w - int(block.sum())
            if 0 < hidden <= left:
                block.fill_(True)
                left -= hidden
                break
        else:
            break
    return mask


def kept_patches(patches: int, drop: float, rng: random.Random) -> Tensor:
    """Return the sorted indices (n,) int64 of the floor((1 - drop) * patches) patches that stay, drawn at random.

    MSN draws one set for all images of a batch; here every image has its own, and all of them equally many. Raises
    ValueError when none would stay.
    """
    count = math.floor((1 - drop) * patches)
    if count < 1:
        raise ValueError(f"`drop` (={drop}) must leave at least one of {patches} patches")
    return torch.tensor(sorted(rng.sample(range(patches), count)))
