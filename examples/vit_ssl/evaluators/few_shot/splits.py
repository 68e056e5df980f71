"""Which images few-shot evaluations train on: MSN's published lists of file names, or draws that a number repeats."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.images import Images
from evaluators.protocol import Features, NotApplicable

TREE = (
    "expected PATH/**/*.txt with a file name per line, as in imagenet_subsets{1,2,3}/{1imgs_class,...,1percent}.txt of "
    "facebookresearch/msn; where classes share file names, CLASS/NAME"
)
_MISSING, _AMBIGUOUS = -1, -2  # in place of the row of a name


class TrainingSet(NamedTuple):
    """A few labelled images: `rows` (n,) int64 of the train split; sets of the same `name` are averaged over."""

    name: str
    rows: np.ndarray


def listed_sets(folder: Path, images: Images) -> list[TrainingSet]:
    """Return the training sets that the .txt files in `folder` and its subfolders list, `images` being the train split.

    A set with s images of every class is called "s-shot", whatever its file is called (MSN's 3imgs_class.txt has five);
    any other one goes by the name of its file, such as "1percent".

    Raises:
        FileNotFoundError: the folder holds no lists.
        ValueError: a list names an image that is not in the train split, or one twice, or none of some class; or the
            images of the train split have no names.
    """
    paths = sorted(folder.rglob("*.txt")) if folder.is_dir() else []
    if not paths:
        raise FileNotFoundError(f"`splits` (={str(folder)!r}) holds no lists: {TREE}")
    if not all(isinstance(item, Path) for item in images.items):
        raise ValueError(f"`splits` (={str(folder)!r}) needs a folder of images (--data); {images.name!r} has no names")
    lists = {path: [name.strip() for name in path.read_text(errors="replace").splitlines()] for path in paths}
    lists = {path: [name for name in names if name] for path, names in lists.items()}
    row_of: dict[str, int] = {name: _MISSING for names in lists.values() for name in names}
    for row, item in enumerate(images.items):
        for name in (item.name, f"{item.parent.name}/{item.name}"):
            if name in row_of:
                row_of[name] = row if row_of[name] == _MISSING else _AMBIGUOUS
    return [_training_set(path, names, row_of, images) for path, names in lists.items()]


def _training_set(path: Path, names: list[str], row_of: dict[str, int], images: Images) -> TrainingSet:
    rows = np.array([row_of[name] for name in names], np.int64)
    _refuse(path, "names are not in the train split", [name for name in names if row_of[name] == _MISSING])
    _refuse(path, "names are those of several images", [name for name in names if row_of[name] == _AMBIGUOUS])
    times = Counter(rows.tolist())
    _refuse(path, "names are of images listed before", [name for name in names if times[row_of[name]] > 1])
    counts = np.bincount(images.labels[rows], minlength=len(images.classes))
    _refuse(path, "classes have no image", [images.classes[label] for label in np.flatnonzero(counts == 0)])
    return TrainingSet(f"{counts[0]}-shot" if len(set(counts)) == 1 else path.stem, rows)


def _refuse(path: Path, what: str, names: Sequence[str]) -> None:
    if names:
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        raise ValueError(f"{str(path)!r}: {len(names)} {what}: {shown}; {TREE}")


def drawn_sets(train: Features, *, shots: Sequence[int], percents: Sequence[float], draws: int) -> list[TrainingSet]:
    """Return `draws` sets for each number of `shots` and each of `percents`; draw i is the same in every run."""
    sets = [TrainingSet(f"{shot}-shot", draw(train, shot, number)) for shot in shots for number in range(draws)]
    for percent in percents:
        sets += [TrainingSet(f"{percent:g}percent", draw_percent(train, percent, number)) for number in range(draws)]
    return sets


def draw(train: Features, shots: int, number: int) -> np.ndarray:
    """Return rows of `shots` images of every class, without repetition; the same for the same `shots` and `number`.

    Raises ValueError when a class has fewer images.
    """
    for name, count in zip(train.classes, _class_sizes(train), strict=True):
        if count < shots:
            raise NotApplicable(f"class {name!r} has {count} train images, but {shots}-shot needs at least {shots}")
    return _choose(train, np.full(len(train.classes), shots), np.random.default_rng([shots, number]))


def draw_percent(train: Features, percent: float, number: int) -> np.ndarray:
    """Return rows of `percent` per cent of every class, rounded, at least one image."""
    sizes = _class_sizes(train)
    counts = np.minimum(np.maximum(np.round(sizes * percent / 100).astype(np.int64), 1), sizes)
    return _choose(train, counts, np.random.default_rng([round(percent * 1e6), number]))


def _class_sizes(train: Features) -> np.ndarray:
    return np.bincount(train.labels, minlength=len(train.classes))


def _choose(train: Features, counts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    members = [np.flatnonzero(train.labels == label) for label in range(len(train.classes))]
    return np.concatenate([rng.choice(rows, count, replace=False) for rows, count in zip(members, counts, strict=True)])
