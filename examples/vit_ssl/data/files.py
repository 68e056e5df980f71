"""Opening image files of every kind, which may be damaged, as 8-bit RGB."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""PIL tells formats by content, and knows some that run programs: it gives PostScript to Ghostscript, by any name."""


def open_image(source: Path | BinaryIO, name: str | None = None) -> Image.Image:
    """Return the image in the mode in which it was stored, read completely.

    Raises:
        OSError: with `name`, by default the path, when the file is no image of `FORMATS`, truncated or damaged.
    """
    try:
        with Image.open(source, formats=FORMATS) as image:
            image.load()
            return image
    except MemoryError:
        raise
    except Exception as error:  # PIL has many kinds of errors for damaged files
        raise OSError(f"cannot read {name or f'the image {str(source)!r}'}: {error}") from error


def open_rgb(source: Path | BinaryIO, name: str | None = None) -> Image.Image:
    """Return the image as a viewer shows it, see `to_rgb`; of an animation the first frame.

    Raises:
        OSError: as `open_image`, also when the image has values that cannot be scaled to 8 bits.
    """
    image = open_image(source, name)
    try:
        return to_rgb(image)
    except ValueError as error:
        raise OSError(f"cannot read {name or f'the image {str(source)!r}'}: {error}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image of any mode in RGB: upright by its EXIF data, on white where it is transparent.

    PIL's own conversion cuts values off at 255, which makes 16-bit images white and float images black. Here 16-bit
    values are divided by 257, and 32-bit and float values are taken to be of the smallest of the ranges 0 to 1 (floats
    alone), 0 to 255 and 0 to 65 535 that holds all of them. Raises ValueError where none does.
    """
    with contextlib.suppress(Exception):  # EXIF data may be wrong in any way, and the image still be good
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _eight_bits(image)
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    ranges = [65_535.0] if image.mode.startswith("I;16") else [1.0] * (image.mode == "F") + [255.0, 65_535.0]
    full = next((full for full in ranges if 0 <= low and high <= full), None)  # none for NaN, too
    if full is None:
        raise ValueError(
            f"values from {low:g} to {high:g} are in none of the ranges 0 to {', '.join(f'{r:g}' for r in ranges)}; "
            "save it with 8 bits"
        )
    scaled = np.empty(values.shape, np.uint8)
    for row in range(0, len(values), 256):  # in parts, because an image may have 179 million pixels
        scaled[row : row + 256] = (values[row : row + 256].astype(np.float64) * (255 / full)).round()
    return Image.fromarray(scaled)
