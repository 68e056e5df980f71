"""Which images a run was begun with: kept beside its checkpoint, compared when it is resumed."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from data.images import Images
from data.left_out import some
from data.stream import ImageStream
from data.unreadable import UNREADABLE, name_of, read_unreadable
from runtime.distributed import is_main, on_main
from storage.whole_file import whole_file

INVENTORY = "images.txt.gz"
_LARGEST = 10**9  # bytes of a list, which are enough for ten million images
SIZES = 10_000
"""The sizes of so many files are compared, those of a larger set evenly spaced: asking for a size takes time."""


def inventory_of(images: Images) -> dict[str, str]:
    """Return {CLASS/FILE: size in bytes or ""} in the images' order; without files one entry with a digest of pixels.

    Of a set of the hub, whose images may be far away, the digest is of 64 images and of all labels.
    """
    if isinstance(images.items, list) and all(isinstance(item, Path) for item in images.items):
        step = max(1, len(images.items) // SIZES)
        return {name_of(images, index): "" if index % step else _size(item) for index, item in enumerate(images.items)}
    digest = hashlib.sha256(images.labels.tobytes())
    indices = range(len(images)) if isinstance(images.items, list) else range(0, len(images), max(1, len(images) // 64))
    for index in indices:
        try:
            item = images.items[index]
            digest.update(item.tobytes() if isinstance(item, Image.Image) else str(item).encode())
        except OSError:  # it cannot be read, which is told when it should be
            digest.update(b"unreadable")
    return {f"{len(images)} images": digest.hexdigest()}


def write_inventory(output: Path, inventory: dict[str, str]) -> None:
    """Write OUTPUT/images.txt.gz, a line for each entry."""
    text = "".join(f"{name}\t{size}\n" for name, size in inventory.items())
    with whole_file(output / INVENTORY) as file:
        file.write(gzip.compress(text.encode(errors="surrogateescape"), mtime=0))


def read_inventory(output: Path) -> dict[str, str] | None:
    """Return what `write_inventory` wrote; None where there is none, as in runs of earlier versions.

    Raises OSError when it is damaged.
    """
    path = output / INVENTORY
    if not path.is_file():
        return None
    try:
        unpacking = zlib.decompressobj(wbits=31)  # of gzip, with its checksum
        text = unpacking.decompress(path.read_bytes(), _LARGEST).decode(errors="surrogateescape")
        if not unpacking.eof or unpacking.unused_data:
            raise zlib.error(f"its end is missing, or it is not one list of at most {_LARGEST:,} bytes")
    except zlib.error as error:
        raise OSError(f"{path} is damaged ({error}): remove it to go on without a comparison of the images") from error
    return {name: size for name, _, size in (line.rpartition("\t") for line in text.split("\n") if line)}


def keep_inventory(images: Images | ImageStream, output: Path) -> None:
    """Write OUTPUT/images.txt.gz where there is none yet; a stream has no inventory. Only the main process writes."""
    if isinstance(images, Images) and is_main() and not (output / INVENTORY).exists():
        write_inventory(output, inventory_of(images))


def images_of_the_run(images: Images | ImageStream, output: Path) -> Images | ImageStream:
    """Return the images as the run in `output` began with them, in the same order; every process must call it.

    An image that could not be read in that run may be gone: it has not been used, keeps its place in the order, and
    another one goes on to take it. A run without an inventory, and a stream, are not compared.

    Raises:
        ValueError: images were added, replaced by others, or removed although they could be read.
        OSError: the inventory is damaged.
    """
    if not isinstance(images, Images):
        return images
    names = on_main(lambda: _compare(images, output))
    if names is None:
        return images
    top = images.items[0].parents[1]
    return dataclasses.replace(images, items=[top / name for name in names], labels=np.zeros(len(names), np.int64))


def _compare(images: Images, output: Path) -> list[str] | None:
    # Returns the names of the run's images if they are others than those of `images`, in a way that does no harm.
    began = read_inventory(output)
    now = inventory_of(images)
    if began is None or list(now.items()) == list(began.items()):
        return None
    unreadable = read_unreadable(output)
    changes = {
        "new": [name for name in now if name not in began],
        "gone": [name for name in began if name not in now and name not in unreadable],
        "of another size or content": [name for name in began if _differ(began[name], now.get(name))],
    }
    said = [f"{len(names)} {what} ({some(names)})" for what, names in changes.items() if names]
    if not said:
        return list(began)
    raise ValueError(
        f"`data` has changed since the run in {str(output)!r} began with {len(began)} images: {'; '.join(said)}. "
        f"Give the data as they were; to go on without images that are gone, write their names into "
        f"{output / UNREADABLE}"
    )


def _differ(one: str, other: str | None) -> bool:
    return bool(one and other and one != other)  # where not both are known, nothing can be said


def _size(path: Path) -> str:
    try:
        return str(path.stat().st_size)
    except OSError:  # it cannot be read, which is told when it should be
        return ""
