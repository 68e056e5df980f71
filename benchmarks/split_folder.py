"""`python -m benchmarks split-folder SOURCE OUTPUT`: class folders as splits of train, val and test."""

import shutil
from pathlib import Path
from typing import Annotated

import tyro

from data.left_out import SUFFIXES
from storage.whole_file import whole_folder


def split_folder(
    source: Annotated[Path, tyro.conf.Positional],
    output: Annotated[Path, tyro.conf.Positional],
    *,
    train: int | None = None,
    val: int,
    test: int | None = None,
    test_from: Path | None = None,
) -> None:
    """Copy SOURCE/CLASS/FILE to OUTPUT/{train,val,test}/CLASS/FILE.

    Within a class files are taken in the order of their names, because files with neighbouring names are often alike,
    such as frames of one video, and belong in one split: train is the first of them, test the last, val lies before it.

    Args:
        source: a folder of class folders.
        output: a folder that does not exist yet.
        train: images of each class, at most; without it all that are left.
        val: images of each class.
        test: images of each class; none needed with `test_from`.
        test_from: a folder of class folders with the test images, where a data set has its own; all are copied.
    """
    if output.exists():
        raise FileExistsError(f"`output` (={str(output)!r}) must be a folder that does not exist yet")
    if (test is None) == (test_from is None):
        raise ValueError(f"`test` (={test}) or `test_from` (={test_from}) must be given, and not both")
    for name, value in (("train", train), ("val", val), ("test", test)):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` (={value}) must be at least 1")
    last = test or 0
    splits: dict[str, list[Path]] = {"train": [], "val": [], "test": []}
    for label, files in _classes("source", source).items():
        rest = len(files) - last - val
        if rest < 1:
            raise ValueError(
                f"`source` (={str(source)!r}) must have more than {val + last} images in each class, "
                f"but {label} has {len(files)}"
            )
        splits["train"] += files[: rest if train is None else min(train, rest)]
        splits["val"] += files[rest : rest + val]
        splits["test"] += files[rest + val :]
    if test_from is not None:
        splits["test"] = [file for files in _classes("test_from", test_from).values() for file in files]
    with whole_folder(output) as folder:
        for split, paths in splits.items():
            for path in paths:
                target = folder / split / path.parent.name / path.name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
            print(f"{split}: {len(paths)} images")


def _classes(name: str, folder: Path) -> dict[str, list[Path]]:
    """The images of each class folder, by name."""
    if not folder.is_dir():
        raise FileNotFoundError(f"`{name}` (={str(folder)!r}) must be a folder of class folders")
    files = {
        path.name: sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.name[0] != ".")
        for path in sorted(folder.iterdir())
        if path.is_dir()
    }
    if not files:
        raise ValueError(f"`{name}` (={str(folder)!r}) must have a folder for each class, but it has no folders")
    return files
