"""Revisited Oxford and Paris in the layout of their release."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evaluators.retrieval.safe_pickle import load_plain_pickle

TREE = "expected DATA/{0}/gnd_{0}.pkl and DATA/{0}/jpg/*.jpg"
"""The placeholder {0} stands for the name of the benchmark."""


@dataclass(frozen=True)
class Query:
    """A query: its image, the box of the landmark in it, and the numbers of the database images by their relation."""

    image: Path
    box: tuple[float, float, float, float]
    """The landmark's box: left, upper, right, lower in px."""
    easy: np.ndarray
    hard: np.ndarray
    junk: np.ndarray

    def truth(self, difficulty: str) -> tuple[np.ndarray, np.ndarray]:
        """Return (positives, junk) of a difficulty: "medium" wants easy and hard images, "hard" the hard ones alone."""
        if difficulty == "medium":
            return np.concatenate([self.easy, self.hard]), self.junk
        if difficulty == "hard":
            return self.hard, np.concatenate([self.junk, self.easy])
        raise ValueError(f"`difficulty` (={difficulty!r}) must be 'medium' or 'hard'")


@dataclass(frozen=True)
class Landmarks:
    """One benchmark: the images that are searched, and the queries, which are not among them."""

    images: list[Path]
    queries: list[Query]


def load_landmarks(data: Path, name: str) -> Landmarks:
    """Read `data`/`name`/gnd_`name`.pkl, without running code that it may hold; `name` is roxford5k or rparis6k.

    Raises:
        FileNotFoundError: the ground truth, or images that it lists, are missing.
        ValueError: the pickle holds something else than the ground truth of such a benchmark.
    """
    tree = TREE.format(name)
    path, folder = data / name / f"gnd_{name}.pkl", data / name / "jpg"
    if not path.is_file() or not folder.is_dir():
        missing = folder if path.is_file() else path
        raise FileNotFoundError(f"`data` (={str(data)!r}) has no {missing.relative_to(data)}: {tree}")
    content = load_plain_pickle(path)
    try:
        images = [folder / _file_name(image) for image in content["imlist"]]
        names = [folder / _file_name(image) for image in content["qimlist"]]
        queries = [_query(image, entry, len(images)) for image, entry in zip(names, content["gnd"], strict=True)]
        if not queries:
            raise ValueError("no query")
    except Exception as error:  # whatever a pickle that somebody made can hold in the place of lists and numbers
        raise ValueError(f"{str(path)!r} is no ground truth of revisited Oxford or Paris: {error!r}") from error
    present = {file.name for file in folder.iterdir()}
    if absent := [file.name for file in (*images, *names) if file.name not in present]:
        raise FileNotFoundError(
            f"{len(absent)} of the {len(images) + len(names)} images of {path.name} are not in {str(folder)!r}, "
            f"first {absent[0]!r}: {tree}"
        )
    return Landmarks(images, queries)


def _query(image: Path, entry: dict[str, Any], images: int) -> Query:
    left, upper, right, lower = (float(edge) for edge in _numbers(entry["bbx"]))
    if not (-np.inf < left < right < np.inf and -np.inf < upper < lower < np.inf):
        raise ValueError(f"the box of {image.name} must be left < right, upper < lower, not {entry['bbx']}")
    easy, hard, junk = (_numbers(entry[key]) for key in ("easy", "hard", "junk"))
    if not np.isin(np.concatenate([easy, hard, junk]), np.arange(images)).all():
        raise ValueError(f"{image.name} lists an image outside 0 ... {images - 1}")
    return Query(image, (left, upper, right, lower), *(numbers.astype(np.int64) for numbers in (easy, hard, junk)))


def _file_name(image: Any) -> str:
    if not isinstance(image, str) or Path(image).name != image or "\0" in image:
        raise ValueError("the name of an image must be text without folders")
    return f"{image}.jpg"


def _numbers(values: Any) -> np.ndarray:
    # Lists in lists are not unfolded: a short pickle can hold more of them than there is memory.
    if isinstance(values, list | tuple) and any(isinstance(value, list | tuple | dict) for value in values):
        raise ValueError("a list must hold numbers")
    return np.ravel(values)
