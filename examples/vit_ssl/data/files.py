"""Opening image files that may be damaged."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

from PIL import Image


def open_image(source: Path | BinaryIO, name: str | None = None) -> Image.Image:
    """Return the image in the mode in which it was stored, read completely.

    Raises:
        OSError: with `name`, by default the path, when the file is no image, truncated or otherwise damaged.
    """
    try:
        with Image.open(source) as image:
            image.load()
            return image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what PIL raises for such files
        raise OSError(f"cannot read {name or f'the image {str(source)!r}'}: {error}") from error
