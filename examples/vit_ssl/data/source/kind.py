"""What --data is: a folder of images, or a set that `datasets` opens, of the hub or a folder of parquet files."""

from __future__ import annotations

import itertools
import os
import re
from pathlib import Path
from typing import Literal

_TABLES = (".arrow", ".parquet")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def kind_of(data: Path) -> Literal["folder", "hub"]:
    """Return "folder" for class folders of images, and "hub" for whatever `datasets.load_dataset` opens.

    A folder with parquet files in it, or in one of its folders, is "hub". What is no folder is taken for the name of a
    set on the hub if it looks like one, `name` or `owner/name`.

    Raises:
        NotADirectoryError: it is a file.
        FileNotFoundError: there is no such folder, and a set of the hub cannot have that name.
    """
    if data.is_dir():
        inside = [entry.path for entry in os.scandir(data) if entry.is_dir()]
        return "hub" if any(map(_has_tables, [data, *inside])) else "folder"
    if data.is_file():
        raise NotADirectoryError(f"`data` (={str(data)!r}) must be a folder of images, not a file: unpack it first")
    if not _HUB_NAME.fullmatch(str(data)):
        raise FileNotFoundError(
            f"`data` (={str(data)!r}) must be a folder of images that exists, or the name of a set on the hub such as "
            "uoft-cs/cifar10"
        )
    return "hub"


def _has_tables(folder: Path | str) -> bool:
    # The first hundred entries are enough, and a folder of images may have a million.
    with os.scandir(folder) as entries:
        return any(entry.name.endswith(_TABLES) for entry in itertools.islice(entries, 100))
