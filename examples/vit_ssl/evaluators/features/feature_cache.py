"""Features on disk: FOLDER/{x.bin, labels.npy, description.json} with checksums, whole or absent, memory-mapped."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from evaluators.protocol import Features
from storage.checksums import check_checksums, write_checksums
from storage.torch_file import UnreadableFile

if TYPE_CHECKING:
    from torch import nn

    from data.images import Images
    from evaluators.features.extraction import Chunk

VERSION = 4
"""This number is raised whenever a change of the code makes the same settings give other features."""


def fingerprint(model: nn.Module | None, images: Images, settings: Mapping[str, Any]) -> str:
    """Return 16 hexadecimal digits that stand for what features depend on: the weights, the images and the settings.

    Image files count by their paths, sizes and times of change, sets of the hub by their name.
    """
    digest = hashlib.sha256(json.dumps([VERSION, images.name, images.split, images.classes]).encode())
    digest.update(json.dumps(settings, sort_keys=True).encode())
    digest.update(np.ascontiguousarray(images.labels))
    for item in images.items if isinstance(images.items, list) else []:
        digest.update(item.tobytes() if isinstance(item, Image.Image) else _described(item))
    if model is not None:
        described = repr(model) + str(getattr(model.config, "num_attention_heads", ""))
        digest.update(described.encode())
        for name, value in model.state_dict().items():
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().numpy())
    return digest.hexdigest()[:16]


def is_whole(folder: Path) -> bool:
    """Return whether the features in `folder` are there; what is damaged or cut off is removed, to be made again.

    Reads all of it once, for the checksums.
    """
    if not folder.is_dir():
        return False
    try:
        check_checksums(folder)
    except (UnreadableFile, FileNotFoundError) as error:
        print(f"the features in {folder} are damaged and made again ({error})", file=sys.stderr)
        shutil.rmtree(folder)
        return False
    return True


def store(folder: Path, chunks: Iterable[Chunk], labels: np.ndarray, classes: list[str]) -> None:
    """Write features chunk by chunk, so that memory holds one, and move them to `folder` when they are complete.

    `labels` (N,) are those of all images, unreadable ones too.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f"{folder.name}.partial{os.getpid()}")
    partial.mkdir()
    try:
        readable, errors, shape, kind = [], [], (0, 0), "float32"
        with (partial / "x.bin").open("wb") as file:
            for chunk in chunks:
                file.write(np.ascontiguousarray(chunk.x))
                readable.append(chunk.readable)
                errors += chunk.errors
                if len(chunk.x):
                    shape, kind = (shape[0] + len(chunk.x), chunk.x.shape[1]), str(chunk.x.dtype)
            file.flush()
            os.fsync(file.fileno())
        np.save(partial / "labels.npy", labels[np.concatenate(readable)])
        description = {"shape": shape, "dtype": kind, "classes": classes, "unreadable": errors}
        (partial / "description.json").write_text(json.dumps(description, indent=1))
        write_checksums(partial)
        partial.rename(folder)
    except OSError:
        if not folder.is_dir():  # where it is, another process was faster
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load(folder: Path) -> tuple[Features, list[str]]:
    """Return the features in `folder`, memory-mapped, and what is wrong with the images that are missing.

    Raises FileNotFoundError where they are not there.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no features in {folder}: all ranks must share this file system, or use no cache")
    description = json.loads((folder / "description.json").read_text())
    shape = tuple(description["shape"])
    # "c": changes stay in memory. A read-only array would make every torch.from_numpy warn.
    x = np.memmap(folder / "x.bin", description["dtype"], "c", shape=shape) if all(shape) else np.empty(shape)
    return Features(x, np.load(folder / "labels.npy"), description["classes"]), description["unreadable"]


def _described(path: Path) -> bytes:
    try:
        found = path.stat()
    except OSError:  # which is told when the image is read
        return f"{path}\n".encode(errors="surrogateescape")
    return f"{path} {found.st_size} {found.st_mtime_ns}\n".encode(errors="surrogateescape")
