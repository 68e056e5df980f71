"""`python -m benchmarks photo-cells` writes the cells of the demo's photographs, at other sizes, too."""

from pathlib import Path

import numpy as np
import pytest
from benchmarks import photo_cells
from PIL import Image

from data.images import load_images, load_photo, split_columns

CHELSEA, COINS = "chelsea.png", "coins.png"


@pytest.fixture
def two_photographs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photo_cells, "PHOTOS", (CHELSEA, COINS))


def test_cells_of_32_px_are_those_of_the_photographs(two_photographs, tmp_path: Path) -> None:
    photo_cells.photo_cells(tmp_path / "cells", side=32)
    for split in ("train", "val", "test"):
        own, written = load_images("photos", split), load_images("folder", split, data=tmp_path / "cells")
        classes = [own.classes.index(name) for name in written.classes]
        wanted = [own[i] for label in classes for i in np.flatnonzero(own.labels == label)]
        assert len(written) == len(wanted) > 0
        for (image, label), (cell, label_of_cell) in zip(written, wanted, strict=True):
            assert classes[label] == label_of_cell
            assert np.array_equal(np.asarray(image), np.asarray(cell))


def test_overlapping_cells_stay_in_the_region_of_their_split(two_photographs, tmp_path: Path, monkeypatch) -> None:
    columns = np.arange(384) // 2  # so that a pixel tells its column
    ramp = Image.fromarray(np.tile(columns.astype(np.uint8), (128, 1))).convert("RGB")
    monkeypatch.setattr(photo_cells, "load_photo", lambda name: ramp)
    photo_cells.photo_cells(tmp_path / "cells", side=64, stride=32)
    for split, wanted in split_columns(384 // 64).items():
        images = load_images("folder", split, data=tmp_path / "cells")
        lefts = sorted({2 * int(np.asarray(image)[0, 0, 0]) for image, _ in images})
        assert lefts == list(range(64 * wanted.start, 64 * (wanted.stop - 1) + 1, 32))
        assert {image.size for image, _ in images} == {(64, 64)}
        assert len(images) == 2 * len(lefts) * 3  # two photographs, and rows at 0, 32 and 64 px


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match=r"`output` \(=.*\) must be a folder that does not exist yet"):
        photo_cells.photo_cells(tmp_path)
    with pytest.raises(ValueError, match=r"`side` \(=128\) must be in 8 ... 64"):
        photo_cells.photo_cells(tmp_path / "cells", side=128)
    with pytest.raises(ValueError, match=r"`stride` \(=40\) must be in 1 ... 32, `side`"):
        photo_cells.photo_cells(tmp_path / "cells", side=32, stride=40)


def test_the_photographs_are_wide_enough_for_the_largest_cells() -> None:
    for name in photo_cells.PHOTOS:
        assert min(map(len, split_columns(load_photo(name).width // 64).values())) > 0
