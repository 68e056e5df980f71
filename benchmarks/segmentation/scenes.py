"""`python -m benchmarks photo-scenes OUTPUT`: photographs pasted as shapes on photographs, with exact masks."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from PIL import Image, ImageDraw

from data.images import CELL, PHOTOS, load_photo, split_columns
from storage.whole_file import whole_folder

SIDE = 64
"""Of a scene in px; every photograph has a strip of this width in every split."""
SIZES = (24, 40)
"""The smallest and the largest side of a shape in px."""
SHAPES = 3
"""In a scene, each over the ones before."""


def photo_scenes(
    output: Annotated[Path, tyro.conf.Positional], *, train: int = 200, val: int = 100, test: int = 200
) -> None:
    """Write OUTPUT/images/{train,val,test}/NUMBER.png and OUTPUT/masks/, for `evaluate.py segmentation --data OUTPUT`.

    A scene is a part of one photograph with a disc, a square and a triangle in it that show parts of others; the label
    of a pixel is the number of its photograph in `data.images.PHOTOS`. Train, val and test show different parts of the
    photographs, those that are train, val and test images of the set "photos". The same call writes the same scenes.

    Args:
        output: a folder that does not exist yet.
        train: scenes of this split.
        val: scenes of this split.
        test: scenes of this split.
    """
    if output.exists():
        raise FileExistsError(f"`output` (={str(output)!r}) must be a folder that does not exist yet")
    with whole_folder(output) as folder:
        for number, (split, count) in enumerate({"train": train, "val": val, "test": test}.items()):
            if count < 1:
                raise ValueError(f"`{split}` (={count}) must be at least 1")
            rng = np.random.default_rng(number)
            strips = [strip(name, split) for name in PHOTOS]
            for kind in ("images", "masks"):
                (folder / kind / split).mkdir(parents=True)
            for index in range(count):
                image, mask = scene(strips, rng)
                image.save(folder / "images" / split / f"{index:04}.png")
                mask.save(folder / "masks" / split / f"{index:04}.png")


def strip(name: str, split: str) -> Image.Image:
    """The part of a photograph that the images of a split are cut from."""
    photo = load_photo(name)
    columns = split_columns(photo.width // CELL)[split]
    return photo.crop((columns.start * CELL, 0, columns.stop * CELL, photo.height))


def scene(strips: list[Image.Image], rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """An image of `SIDE` px, and the number of the strip that each of its pixels is from."""
    background, *others = rng.choice(len(strips), 1 + SHAPES, replace=False).tolist()
    image, mask = part(strips[background], rng), Image.new("L", (SIDE, SIDE), background)
    for draw, label in zip(DRAWN, others, strict=True):
        size = int(rng.integers(SIZES[0], SIZES[1] + 1))
        x, y = rng.integers(0, SIDE - size + 1, 2).tolist()
        shape = Image.new("1", (SIDE, SIDE))
        draw(ImageDraw.Draw(shape), x, y, size)
        image.paste(part(strips[label], rng), mask=shape)
        mask.paste(label, mask=shape)
    return image, mask


def part(photo: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A square of a photograph at random, none that is blank."""
    while True:
        x, y = rng.integers(0, photo.width - SIDE + 1), rng.integers(0, photo.height - SIDE + 1)
        found = photo.crop((x, y, x + SIDE, y + SIDE))
        if np.ptp(np.asarray(found.convert("L"))) >= 8:
            return found


def _disc(draw: ImageDraw.ImageDraw, x: int, y: int, size: int) -> None:
    draw.ellipse((x, y, x + size - 1, y + size - 1), fill=1)


def _square(draw: ImageDraw.ImageDraw, x: int, y: int, size: int) -> None:
    draw.rectangle((x, y, x + size - 1, y + size - 1), fill=1)


def _triangle(draw: ImageDraw.ImageDraw, x: int, y: int, size: int) -> None:
    draw.polygon([(x, y + size - 1), (x + size - 1, y + size - 1), (x + size // 2, y)], fill=1)


DRAWN: tuple[Callable[[ImageDraw.ImageDraw, int, int, int], None], ...] = (_disc, _square, _triangle)
