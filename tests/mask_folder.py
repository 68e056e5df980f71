"""A small folder of images and masks: two shapes in colours of their own over noise, and a part without labels."""

from pathlib import Path

import numpy as np
from PIL import Image

COLORS = np.array([[90, 90, 90], [150, 70, 70], [70, 70, 150]])
"""Of the background and of the two shapes."""
COUNTS = {"train": 7, "val": 3, "test": 3}


def write_masked(data: Path, *, counts: dict[str, int] | None = None) -> Path:
    """Images of 40 x 36 px; their masks are indexed PNGs, and the first patch of the first one has no labels."""
    rng = np.random.default_rng(0)
    for split, count in (COUNTS | (counts or {})).items():
        for kind in ("images", "masks"):
            (data / kind / split).mkdir(parents=True)
        for index in range(count):
            labels = np.zeros((36, 40), np.uint8)
            for label in (1, 2):
                y, x = rng.integers(0, (20, 24))
                labels[y : y + 16, x : x + 16] = label
            pixels = COLORS[labels] + rng.integers(-40, 40, (36, 40, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(data / "images" / split / f"{index}.png")
            if index == 0:
                labels[:9, :10] = 255
            mask = Image.fromarray(labels)
            mask.putpalette(list(range(256)) * 3)
            mask.save(data / "masks" / split / f"{index}.png")
    return data
