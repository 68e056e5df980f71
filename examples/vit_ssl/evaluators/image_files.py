"""Opening image files that may be damaged."""

from __future__ import annotations

from pathlib import Path

from PIL import Image


def open_image(path: Path) -> Image.Image:
    """The image in the mode in which it was stored, read completely.

    Raises:
        OSError: naming the path, when the file is no image, truncated or otherwise damaged.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what PIL raises for such files
        raise OSError(f"cannot read the image {str(path)!r}: {error}") from error
