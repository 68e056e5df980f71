"""Image sets that the `datasets` library opens: by name from the hub, or a local folder of parquet files or images."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from data.files import open_rgb

SPLIT_NAMES = {"train": ("train",), "val": ("validation", "val", "valid"), "test": ("test",)}
"""The sets of the hub call our splits by these names."""


class HubImages(Sequence[Image.Image]):
    """The images of an opened set in RGB, read and decoded when they are asked for."""

    def __init__(self, rows: Any, column: str) -> None:
        import datasets

        # The images stay undecoded, so that a damaged one raises here, with its number.
        self._rows, self._column = rows.cast_column(column, datasets.Image(decode=False)), column

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        item = self._rows[index][self._column]
        return decode(content(item), f"image {index} ({item['path'] or 'without a name'})")


def open_set(name: str, split: str, *, streaming: bool = False) -> tuple[Any, str, str]:
    """Return (data set, image column, label column or "") of one split, `name` as for `datasets.load_dataset`.

    Raises:
        ImportError: `datasets` is not installed.
        FileNotFoundError: the set has no such split.
        ValueError: it has no column of images or several label columns.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError("image sets of the hub need the package `datasets`: pip install 'vmf_heads[hub]'") from error
    known = datasets.get_dataset_split_names(name)
    found = [candidate for candidate in SPLIT_NAMES[split] if candidate in known]
    if not found:
        raise FileNotFoundError(f"`data` (={name!r}) has no {split!r} split; it has {', '.join(known)}")
    rows = datasets.load_dataset(name, split=found[0], streaming=streaming)
    images = [column for column, kind in rows.features.items() if isinstance(kind, datasets.Image)]
    labels = [column for column, kind in rows.features.items() if isinstance(kind, datasets.ClassLabel)]
    if len(images) != 1:
        raise ValueError(f"`data` (={name!r}) must have one column of images; it has {images or list(rows.features)}")
    if len(labels) > 1:
        raise ValueError(f"`data` (={name!r}) must have at most one column of class labels; it has {labels}")
    return rows, images[0], labels[0] if labels else ""


def load_hub(name: str, split: str) -> tuple[HubImages, np.ndarray, list[str]]:
    """Return (images, labels (N,) int64, classes) of one split; where there are no labels, all are of the class
    "image".
    """
    rows, image_column, label_column = open_set(name, split)
    images = HubImages(rows, image_column)
    if not label_column:
        return images, np.zeros(len(images), np.int64), ["image"]
    return images, np.array(rows[label_column], np.int64), list(rows.features[label_column].names)


def content(item: dict[str, Any]) -> bytes:
    """Return the file of an undecoded image {"bytes", "path"}, wherever it is."""
    if item["bytes"] is not None:
        return item["bytes"]
    import fsspec

    with fsspec.open(item["path"], "rb") as file:
        return file.read()


def decode(file: bytes, name: str) -> Image.Image:
    """Return an image file in RGB; raise OSError with `name` where it cannot be read."""
    return open_rgb(io.BytesIO(file), name)
