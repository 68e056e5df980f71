"""Images that turn out to be unreadable: in training others take their places, and they are listed."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.augmented_images import AugmentedImages
from data.images import Images

UNREADABLE = "unreadable.txt"
SHOWN = 20
"""So many are shown by each process; all of them are in the file."""
MOST_IN_A_ROW = 100

Failures = list[tuple[int, str]]
"""(index of an image, what is wrong with it) of each that could not be read."""


class SubstitutedImages(AugmentedImages):
    """Items are (sample, failures): in place of an image that cannot be read comes the next one that can.

    So a batch has its size, and which image takes the place depends on nothing but the images. Raises OSError when a
    hundred images in a row cannot be read.
    """

    def __getitem__(self, index: int) -> tuple[Any, Failures]:
        failures: Failures = []
        for place in range(index, index + min(MOST_IN_A_ROW, len(self))):
            try:
                image = self.images[place % len(self)][0]
            except OSError as error:
                failures.append((place % len(self), str(error)))
            else:
                return self.augmented(image, index), failures
        raise OSError(f"{len(failures)} images in a row cannot be read; {failures[0][1]}")


def collate(items: list[tuple[Any, Failures]], collate_samples: Callable[..., Any]) -> tuple[Any, Failures]:
    """Return (batch of the samples, all failures)."""
    return collate_samples([sample for sample, _ in items]), [failure for _, found in items for failure in found]


class Unreadable:
    """The images of a run that cannot be read: CLASS/FILE in OUTPUT/unreadable.txt, whichever process has met them.

    Args:
        images: those of the run.
        output: its folder, which exists when the first image is noted.
    """

    def __init__(self, images: Images, output: Path) -> None:
        self._images, self._output, self._shown = images, output, 0
        self._names = read_unreadable(output)

    def batches(self, loaded: Iterable[tuple[Any, Failures]]) -> Iterator[Any]:
        """Yield the batches of `collate`, noting their failures."""
        for batch, failures in loaded:
            for index, error in failures:
                self._note(name_of(self._images, index), error)
            yield batch

    def _note(self, name: str, error: str) -> None:
        if name in self._names:
            return
        self._names.add(name)
        with (self._output / UNREADABLE).open("a", encoding="utf-8", errors="surrogateescape") as file:
            file.write(f"{name}\n")
        self._shown += 1
        if self._shown <= SHOWN:
            more = f" (more are listed in {self._output / UNREADABLE} alone)" if self._shown == SHOWN else ""
            tqdm.write(f"{error}; another image takes its place{more}", file=sys.stderr)


def read_unreadable(output: Path) -> set[str]:
    """Return the names in OUTPUT/unreadable.txt."""
    path = output / UNREADABLE
    return set(path.read_text("utf-8", "surrogateescape").split("\n")) - {""} if path.exists() else set()


def print_unreadable(output: Path) -> None:
    """Say how many images of the run could not be read, if any."""
    if names := read_unreadable(output):
        print(f"{len(names)} images could not be read, and others took their places: {output / UNREADABLE}")


def name_of(images: Images, index: int) -> str:
    """Return CLASS/FILE of an image, or its number where it is no file."""
    item = images.items[index] if isinstance(images.items, list) else None
    return f"{item.parent.name}/{item.name}" if isinstance(item, Path) else f"image {index}"


def readable(images: Images) -> Images:
    """Return the images that can be read, those that there are features of; each of them is opened."""
    kept = [index for index in range(len(images)) if _opens(images, index)]
    return dataclasses.replace(images, labels=images.labels[kept], items=[images.items[index] for index in kept])


def _opens(images: Images, index: int) -> bool:
    try:
        images[index]
    except OSError:
        return False
    return True
