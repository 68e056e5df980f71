"""What a folder of images holds besides the images that are used, so that nothing is left out in silence."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is of the system: `._x.png` and `__MACOSX` of macOS, `.ipynb_checkpoints`, ..."""
    return name.startswith(".") or name == "__MACOSX"


def some(names: Sequence[str], most: int = 5) -> str:
    """Return the first names, for a sentence."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


class LeftOut:
    """Collects what is left out while class folders are listed; `notes` are sentences about it."""

    def __init__(self) -> None:
        self._hidden: list[str] = []
        self._nested: list[str] = []
        self._loose: list[str] = []
        self._others: Counter[str] = Counter()

    def add_class(self, folder: Path) -> list[Path]:
        """Return the images in a class folder, sorted, and remember what else is there."""
        found = []
        for entry in os.scandir(folder) if folder.is_dir() else ():
            suffix = Path(entry.name).suffix.lower()
            if is_hidden(entry.name):
                self._hidden += [entry.name] if suffix in SUFFIXES else []
            elif suffix in SUFFIXES:
                found.append(folder / entry.name)
            elif entry.is_dir():
                inside = (path for path in Path(entry.path).rglob("*") if path.suffix.lower() in SUFFIXES)
                self._nested += [f"{folder.name}/{path.relative_to(folder)}" for path in inside]
            else:
                self._others[suffix or "no suffix"] += 1
        return sorted(found)

    def add_loose(self, top: Path) -> None:
        """Remember the images beside the class folders."""
        names = (entry.name for entry in os.scandir(top) if not is_hidden(entry.name))
        self._loose += [name for name in names if Path(name).suffix.lower() in SUFFIXES]

    def notes(self) -> tuple[str, ...]:
        """Return a sentence about each kind of thing that is left out."""
        others = [f"{suffix} {count}" for suffix, count in sorted(self._others.items())]
        kinds = [
            (self._loose, "images are in no class folder"),
            (self._nested, "images are in folders inside a class folder"),
            (self._hidden, "hidden files are no images"),
        ]
        notes = [f"{len(names)} {what} and left out ({some(sorted(names))})" for names, what in kinds if names]
        if others:
            notes.append(f"{sum(self._others.values())} files are of no known image type and left out ({some(others)})")
        return tuple(notes)
