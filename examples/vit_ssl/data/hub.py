"""Image sets that the `datasets` library opens: by name from the hub, or a local folder of parquet files or images."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.files import open_rgb
from storage.torch_file import UnreadableFile

SPLIT_NAMES = {"train": ("train",), "val": ("validation", "val", "valid"), "test": ("test",)}
"""The sets of the hub call our splits by these names."""


class HubImages(Sequence[Image.Image]):
    """The images of an opened set in RGB, read and decoded when they are asked for."""

    def __init__(self, rows: Any, column: str, name: str) -> None:
        import datasets

        # The images stay undecoded, so that a damaged one raises here, with its number.
        self._rows, self._column = rows.cast_column(column, datasets.Image(decode=False)), column
        self._name = name

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        item = self._rows[index][self._column]
        name = f"image {index} ({(item and item['path']) or 'without a name'})"
        try:
            file = content(item, self._name)
        except OSError as error:
            raise OSError(f"cannot read {name}: {error}") from error
        return decode(file, name)


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
    try:
        known = datasets.get_dataset_split_names(name)
        found = [candidate for candidate in SPLIT_NAMES[split] if candidate in known]
        rows = datasets.load_dataset(name, split=found[0], streaming=streaming) if found else None
    except Exception as error:  # whatever files that somebody else made can make of `datasets`
        reason = str(error.__cause__ or error)
        raise UnreadableFile(f"`data` (={name!r}) cannot be opened by `datasets`: {reason}") from error
    if rows is None:
        raise FileNotFoundError(f"`data` (={name!r}) has no {split!r} split; it has {', '.join(known)}")
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
    images = HubImages(rows, image_column, name)
    if not label_column:
        return images, np.zeros(len(images), np.int64), ["image"]
    labels, classes = list(rows[label_column]), list(rows.features[label_column].names)
    if unlabelled := [row for row, label in enumerate(labels) if label is None or not 0 <= label < len(classes)]:
        raise ValueError(
            f"`data` (={name!r}) has {len(unlabelled)} images without a label, first image {unlabelled[0]}"
        )
    return images, np.array(labels, np.int64), classes


def content(item: dict[str, Any] | None, name: str) -> bytes:
    """Return the file of an undecoded image {"bytes", "path"} of the set `name`, wherever in that set it is.

    Raises OSError where a row has none (None), or where its path leads out of the set.
    """
    if item is None or (item["bytes"] is None and item["path"] is None):
        raise OSError("its row holds no image")
    if item["bytes"] is not None:
        return item["bytes"]
    _check_place(item["path"], name)
    import fsspec

    with fsspec.open(item["path"], "rb") as file:
        return file.read()


def _check_place(path: str, name: str) -> None:
    # What is last in "zip://a.png::/set/images.zip" is where the others are. A set of the hub lies in the cache.
    import datasets

    place, local = path.rpartition("::")[2], Path(name).is_dir()
    folders = [Path(name)] if local else [Path(datasets.config.HF_CACHE_HOME), Path(datasets.config.HF_DATASETS_CACHE)]
    # Links are not followed: an image of the set may be a link to somewhere else, which its owner has made.
    known = [root for folder in folders for root in (folder.absolute(), folder.resolve())]
    plain = ".." not in Path(place).parts and "\0" not in place
    inside = plain and any(Path(place).absolute().is_relative_to(root) for root in known)
    if not inside and (local or not place.startswith("hf://")):
        raise OSError(f"its path {path!r} leads out of the set {name!r}")


def decode(file: bytes, name: str) -> Image.Image:
    """Return an image file in RGB; raise OSError with `name` where it cannot be read."""
    return open_rgb(io.BytesIO(file), name)
