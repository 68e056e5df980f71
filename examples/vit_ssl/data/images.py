"""The images: photographs from the scikit-image wheel, digits of scikit-learn, a folder of class folders, hub sets."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from data.files import open_image, open_rgb
from data.hub import load_hub
from data.left_out import SUFFIXES, LeftOut, is_hidden, some

NAMES = ("photos", "digits", "folder", "hub")
SPLITS = ("train", "val", "test")
LIBRARY_SETS = ("photos", "digits")
"""These sets come with libraries."""
WHOLE_BELOW = 112
"""Images that are evaluated at a smaller side than this, in px, are small ones, such as CIFAR's."""

CELL = 32
"""A photograph is cut into cells of this side in pixels; the unused margin between its regions is as wide."""

# Of the images in the wheel these are photographs with enough texture to tell them apart. What is left out are
# drawings, synthetic and reconstructed images, silhouettes, text, faces of 25 px, and `motorcycle_right`, which shows
# the scene of `motorcycle_left`.
PHOTOS = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "moon.png",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
)
TREE = "expected PATH/{train,val,test}/CLASS/*.jpg, or PATH/CLASS/*.jpg where everything is the train split"


@dataclass(frozen=True)
class Images(Dataset):
    """One split: `images[i]` is `(PIL image in RGB, label)`; `labels` (N,) int64 index `classes`.

    Files are opened when they are asked for: an unreadable or truncated one raises OSError with its path.
    """

    name: str
    split: str
    classes: list[str]
    labels: np.ndarray
    items: Sequence[Image.Image | Path]
    notes: tuple[str, ...] = ()
    """What a person should know about the folder, above all what in it is left out."""

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        item = self.items[index]
        return (open_rgb(item) if isinstance(item, Path) else item), int(self.labels[index])


def load_images(name: str, split: str, *, data: Path | None = None) -> Images:
    """Load one split of a data set; the same call always gives the same images in the same order.

    - `"photos"`: `CELL` px cells of 14 photographs, labelled with the photograph they are from: 1509 train, 636 val and
      837 test images. The columns of cells of a photograph are, from left to right: test, an unused margin, train, an
      unused margin, val. So no two cells share a pixel, and train pixels are at least `CELL` px away from those of val
      and test. A home-made task: cells of one photograph share colour and light, so print raw pixels and a random
      network beside any result. The photographs come inside the scikit-image wheel; their authors and licences are in
      the docstrings of `skimage.data`, e.g. `help(skimage.data.astronaut)`.
    - `"digits"`: scikit-learn's 1797 handwritten digits, enlarged from 8 to 32 px; 60/20/20 per cent, stratified.
    - `"folder"`: the images in `data`/SPLIT/CLASS/, or in `data`/CLASS/ where everything is the train split.
    - `"hub"`: the set that `datasets.load_dataset` opens under the name `data`, e.g. uoft-cs/cifar10, or a local folder
      of parquet files; its validation split is our val.

    Raises:
        ValueError: `name` or `split` is unknown, or `data` is missing for a folder or hub set or given for another.
        FileNotFoundError: the folder holds no images in the expected tree.
    """
    if name not in NAMES:
        raise ValueError(f"`name` (={name!r}) must be one of {', '.join(NAMES)}")
    if split not in SPLITS:
        raise ValueError(f"`split` (={split!r}) must be one of {', '.join(SPLITS)}")
    if name == "folder":
        if data is None:
            raise ValueError(f"`data` (=None) must be the path of a folder of images: {TREE}")
        return _folder(split, Path(data))
    if name == "hub":
        if data is None:
            raise ValueError("`data` (=None) must be the name of an image set of the hub, e.g. uoft-cs/cifar10")
        items, labels, classes = load_hub(str(data), split)
        return Images("hub", split, classes, labels, items)
    if data is not None:
        raise ValueError(f"`data` (={str(data)!r}) is only for the data sets 'folder' and 'hub', not for {name!r}")
    return _photos(split) if name == "photos" else _digits(split)


def share_kept(name: str, image_size: int) -> float:
    """Return the share of an image's shorter side that is evaluated: small images whole, others as ImageNet's are."""
    return 1.0 if name in LIBRARY_SETS or image_size < WHOLE_BELOW else 224 / 256


def split_columns(columns: int) -> dict[str, range]:
    """Return the columns of cells of each split; the two columns between them (the margins) belong to none."""
    test = round(0.28 * (columns - 2))
    val = round(0.22 * (columns - 2))
    return {"test": range(test), "train": range(test + 1, columns - val - 1), "val": range(columns - val, columns)}


@cache
def load_photo(filename: str) -> Image.Image:
    """Return one photograph in RGB, halved where its longer side is over 800 px, so that it does not outnumber
    the others.
    """
    import skimage.data

    # The file is opened by its path, because skimage.data's functions may try to download it.
    photo = open_image(Path(skimage.data.__file__).parent / filename).convert("RGB")
    return photo.reduce(2) if max(photo.size) > 800 else photo


def _photos(split: str) -> Images:
    cells, labels = [], []
    for label, filename in enumerate(PHOTOS):
        photo = load_photo(filename)
        for row in range(photo.height // CELL):
            for column in split_columns(photo.width // CELL)[split]:
                x, y = column * CELL, row * CELL
                cell = photo.crop((x, y, x + CELL, y + CELL))
                # A blank cell (the black around the retina, an overcast sky) does not show which photograph it is from.
                if np.ptp(np.asarray(cell.convert("L"))) >= 8:
                    cells.append(cell)
                    labels.append(label)
    return Images("photos", split, [Path(name).stem for name in PHOTOS], np.array(labels, np.int64), cells)


def _digits(split: str) -> Images:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    rest, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    train, val = train_test_split(rest, test_size=0.25, stratify=labels[rest], random_state=0)
    index = np.sort({"train": train, "val": val, "test": test}[split])
    grey = (pixels[index].reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)
    items = [Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC).convert("RGB") for image in grey]
    return Images("digits", split, [str(digit) for digit in range(10)], labels[index].astype(np.int64), items)


def _folder(split: str, root: Path) -> Images:
    if not root.is_dir():
        raise FileNotFoundError(f"`data` (={str(root)!r}) is not a folder: {TREE}")
    present = [name for name in SPLITS if (root / name).is_dir()]
    if present and split not in present:
        raise FileNotFoundError(f"`data` (={str(root)!r}) has no folder {split!r}: {TREE}")
    if not present and split != "train":
        raise FileNotFoundError(f"`data` (={str(root)!r}) has no split folders, so there is no {split!r} split: {TREE}")
    # The classes are those of all splits together, so that a label means the same class in each of them.
    tops = [root / name for name in present] or [root]
    classes = sorted({name for top in tops for name in _class_folders(top)})
    top = root / split if present else root
    items, labels, left_out = [], [], LeftOut()
    left_out.add_loose(top)
    for label, name in enumerate(classes):
        found = left_out.add_class(top / name)
        items += found
        labels += [label] * len(found)
    if not items:
        hints = "; ".join(left_out.notes())
        raise FileNotFoundError(
            f"no images ({', '.join(sorted(SUFFIXES))}) in {str(top)!r}: {TREE}{f'. Here {hints}' if hints else ''}"
        )
    empty = [name for label, name in enumerate(classes) if label not in set(labels)]
    missing = [f"{len(empty)} of {len(classes)} classes have no {split} images ({some(empty)})"] if empty else []
    return Images("folder", split, classes, np.array(labels, np.int64), items, (*left_out.notes(), *missing))


def _class_folders(top: Path) -> list[str]:
    return [entry.name for entry in os.scandir(top) if entry.is_dir() and not is_hidden(entry.name)]
