"""The report's pictures of images: what the network sees, what it finds alike, what its tokens tell apart."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from transformers import ViTModel

from data.augment import MultiCrop, to_tensor
from data.images import CELL, Images, split_columns
from evaluators.protocol import Features

SPLIT_COLORS = {"test": "#CC79A7", "train": "#009E73", "val": "#56B4E9"}  # of Okabe and Ito's palette
TILE, BETWEEN, BLOCKS_APART, LINE = 56, 2, 14, 20
"""The side of a tile, the space between tiles and between blocks, and the height of the line of titles, in px."""
FRAME = "#E69F00"  # orange of the same


class Tile(NamedTuple):
    """An image in its place."""

    image: Image.Image
    framed: bool = False


def to_image(view: Tensor) -> Image.Image:
    """Return the RGB image of a tensor (3, h, w): the inverse of `data.augment.to_tensor`, up to rounding."""
    black, white = (to_tensor(Image.new("RGB", (1, 1), color)) for color in ("black", "white"))
    pixels = 255 * (view - black) / (white - black)
    return Image.fromarray(pixels.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy())


def crops(images: Images, indices: Sequence[int], transform: MultiCrop) -> list[list[Image.Image]]:
    """Return, for each index, the image itself and one draw of its views, global ones first."""
    return [
        [images[index][0], *map(to_image, transform(images[index][0], random.Random(index)))] for index in indices
    ]  # fmt: skip


def splits_drawn(photo: Image.Image, scale: int = 2) -> Image.Image:
    """Return the photograph with its cells outlined in the colour of their split; what belongs to none is dimmed."""
    columns, rows = photo.width // CELL, photo.height // CELL
    owner = {column: split for split, members in split_columns(columns).items() for column in members}
    large = photo.resize((photo.width * scale, photo.height * scale), Image.Resampling.BICUBIC)
    picture = Image.blend(large, Image.new("RGB", large.size, "gray"), 0.8)
    draw, side = ImageDraw.Draw(picture), CELL * scale
    for column, split in owner.items():
        for row in range(rows):
            x, y = column * side, row * side
            picture.paste(large.crop((x, y, x + side, y + side)), (x, y))
            draw.rectangle((x + 1, y + 1, x + side - 2, y + side - 2), outline=SPLIT_COLORS[split], width=2)
    return picture


def pick_queries(labels: np.ndarray, count: int, seed: int = 0) -> list[int]:
    """Return the indices of `count` images of different classes, drawn without looking at any result."""
    rng = np.random.default_rng(seed)
    classes = rng.permutation(np.unique(labels))[:count]
    return [int(rng.choice(np.flatnonzero(labels == label))) for label in np.sort(classes)]


def pick_contrast(images: Images, names: Sequence[str]) -> list[int]:
    """Return the index of the image with the largest spread of grey levels in each of the named classes."""
    spread = np.array([np.asarray(picture.convert("L")).std() for picture, _ in images])
    return [int(np.where(images.labels == images.classes.index(name), spread, -1).argmax()) for name in names]


def nearest(bank: Features, queries: Features, indices: Sequence[int], count: int) -> np.ndarray:
    """Return the indices (len(indices), count) of the bank's images most similar to each query, best first."""
    reference = torch.nn.functional.normalize(torch.from_numpy(bank.x), dim=1)
    query = torch.nn.functional.normalize(torch.from_numpy(queries.x[list(indices)]), dim=1)
    return (query @ reference.T).topk(count).indices.numpy()


def contact_sheet(titles: Sequence[str], rows: Sequence[tuple[str, Sequence[Sequence[Tile]]]]) -> Image.Image:
    """Return an RGB image of a block of tiles for each title, with a row of tiles in each of them for each of `rows`.

    A row is a label and its tiles in each block, equally many in all rows. Images keep their aspect ratio; small ones
    are enlarged without smoothing.
    """
    font = ImageFont.load_default(12)
    labels = BLOCKS_APART + max(int(font.getlength(label)) for label, _ in rows)
    widths = [
        max(len(tiles) * (TILE + BETWEEN), int(font.getlength(title))) + BLOCKS_APART
        for title, tiles in zip(titles, rows[0][1], strict=True)
    ]
    sheet = Image.new("RGB", (labels + sum(widths), LINE + len(rows) * (TILE + BETWEEN)), "white")
    draw = ImageDraw.Draw(sheet)
    for block, title in enumerate(titles):
        draw.text((labels + sum(widths[:block]), 2), title, "black", font)
    for number, (label, blocks) in enumerate(rows):
        top = LINE + number * (TILE + BETWEEN)
        draw.text((2, top + TILE // 2), label, "black", font, anchor="lm")
        for block, tiles in enumerate(blocks):
            for column, tile in enumerate(tiles):
                left = labels + sum(widths[:block]) + column * (TILE + BETWEEN)
                sheet.paste(fitted(tile.image), (left, top))
                if tile.framed:
                    draw.rectangle((left, top, left + TILE - 1, top + TILE - 1), outline=FRAME, width=3)
    return sheet


def fitted(image: Image.Image) -> Image.Image:
    """Return an image in the middle of a white square of `TILE` px, as large as there is room for."""
    method = Image.Resampling.NEAREST if max(image.size) < TILE else Image.Resampling.BICUBIC
    return ImageOps.pad(image, (TILE, TILE), method, "white")


@torch.inference_mode()
def token_maps(
    backbone: ViTModel, photos: Sequence[Image.Image], size: tuple[int, int] = (384, 256)
) -> list[Image.Image]:
    """Return the first three principal components of the patch tokens as red, green and blue, one pixel per token.

    The photographs are resized to `size` (width, height in px) and share one PCA. A component's 2 % and 98 % quantiles
    become dark and bright; which component is which colour, and its sign, mean nothing.
    """
    pixels = torch.stack([to_tensor(photo.resize(size, Image.Resampling.BICUBIC)) for photo in photos])
    tokens = backbone(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state[:, 1:]
    flat = tokens.flatten(0, 1) - tokens.mean(dim=(0, 1))
    _, _, directions = torch.linalg.svd(flat, full_matrices=False)
    components = flat @ directions[:3].T
    low, high = components.quantile(torch.tensor([0.02, 0.98]), dim=0)
    patch = backbone.config.patch_size
    shape = (len(photos), size[1] // patch, size[0] // patch, 3)
    colors = (255 * (components - low) / (high - low).clamp(min=1e-12)).clamp(0, 255).to(torch.uint8).view(shape)
    return [Image.fromarray(color.numpy()) for color in colors]
