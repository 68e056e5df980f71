"""A small folder in DAVIS-2017's layout: squares that move over noise, each in its own colour."""

from pathlib import Path

import numpy as np
from PIL import Image

PALETTE = [0, 0, 0, 200, 30, 30, 30, 200, 30, 30, 30, 200]
HEIGHT, WIDTH, STEP = 64, 128, 8


def write_davis(
    data: Path, sequences: dict[str, list[tuple[int, int]]], frames: int = 6, size: tuple[int, int] = (WIDTH, HEIGHT)
) -> Path:
    """`sequences` maps a name to the (row, column) of its objects' first positions, in steps of 8 px.

    Objects are 24 x 24 px and move one step to the right per frame; frames are rescaled to `size` (width, height).
    """
    listing = data / "ImageSets" / "2017" / "val.txt"
    listing.parent.mkdir(parents=True, exist_ok=True)
    listing.write_text("".join(f"{name}\n" for name in sequences))
    rng = np.random.default_rng(0)
    for name, objects in sequences.items():
        images, annotations = (data / kind / "480p" / name for kind in ("JPEGImages", "Annotations"))
        images.mkdir(parents=True)
        annotations.mkdir(parents=True)
        background = rng.integers(60, 90, (HEIGHT, WIDTH, 3), np.uint8)
        for frame in range(frames):
            pixels, labels = background.copy(), np.zeros((HEIGHT, WIDTH), np.uint8)
            for number, (row, column) in enumerate(objects, start=1):
                place = np.s_[row * STEP : (row + 3) * STEP, (column + frame) * STEP : (column + frame + 3) * STEP]
                pixels[place] = PALETTE[3 * number : 3 * number + 3]
                labels[place] = number
            Image.fromarray(pixels).resize(size).save(images / f"{frame:05}.jpg", quality=95)
            annotation = Image.fromarray(labels).resize(size, Image.Resampling.NEAREST)
            annotation.putpalette(PALETTE)
            annotation.save(annotations / f"{frame:05}.png")
    return data
