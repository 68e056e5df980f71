"""Where the images of a run come from: found out, looked at, and kept with the run."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from config.recipe import load_recipe
from data.images import Images, load_images
from data.source.check import check_images, lines, look_at
from data.source.kept import DATA, Source, keep_source, read_source
from data.source.kind import kind_of

RECIPE = load_recipe("photos_dino_vmf")


@pytest.fixture(autouse=True)
def _however_slow_the_machine_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.source.check.SECONDS", float("inf"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One image is unreadable, two are grey, and one is in both classes under its name."""
    rng = np.random.default_rng(0)
    for name, count in {"cat": 12, "dog": 3}.items():
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(count):
            pixels = rng.integers(0, 256, (14 + index, 14, 3)).astype(np.uint8)
            pixels = pixels[..., 0] if (name, index) in {("cat", 3), ("cat", 4)} else pixels
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{index}.png")
    (tmp_path / "images/cat/5.png").write_bytes(b"no image")
    (tmp_path / "images/dog/0.png").write_bytes((tmp_path / "images/cat/0.png").read_bytes())
    Image.new("RGB", (14, 14)).save(tmp_path / "images/cat/0.JPG", format="jpeg")
    return tmp_path / "images"


def test_what_is_found_in_a_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = look_at(load_images("folder", "train", data=folder), RECIPE)
    assert found == {
        "images": 16,
        "classes": {"cat": 13, "dog": 3},
        "looked_at": 16,
        "modes": {"RGB": 13, "L": 2},
        "unreadable": ["cat/5.png"],
        "smallest": "14 x 14",
        "largest": "14 x 25",
        "short_side": 14,
        "names": {"in_several_classes": 3, "of_equal_content": 1, "but_for_the_type": 2},
    }
    assert capsys.readouterr().out.splitlines() == [
        "16 images in 2 classes, 3 (dog) to 13 (cat) in each",
        "  16 of them looked at: 14 x 14 to 14 x 25 px; modes: RGB 13, L 2",
        "  `image_size` (=32) enlarges most of them twice or more: "
        "perhaps --set image_size=12 patch_size=4 local_size=4",
        "  cannot be read: 1 of those (cat/5.png)",
        "  images in several classes, with the same name and content: 1",
        "  images that share their name with another one of their class, but for the type: 2",
    ]


def test_names_may_be_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = os.fsdecode(b"latin-\xe9")
    (tmp_path / "images" / name).mkdir(parents=True)
    (tmp_path / "images" / name / f"{name}.png").write_bytes(b"no image")
    found = look_at(load_images("folder", "train", data=tmp_path / "images"), RECIPE)
    assert capsys.readouterr().out.splitlines() == [
        "1 images in 1 classes, 1 in each",
        "  cannot be read: 1 of those (latin-\\udce9/latin-\\udce9.png)",
    ]
    keep_source(tmp_path, Source(tmp_path / "images" / name), found)
    assert read_source(tmp_path).data == tmp_path / "images" / name


def test_a_large_set_is_not_opened_as_a_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.source.check.MOST", 4)
    images = load_images("folder", "train", data=folder)
    found = check_images(images)
    assert (found["looked_at"], found["images"]) == (4, 16)
    assert found == check_images(images)  # the same four
    assert "4 of them looked at" in lines(found, RECIPE)[1]
    monkeypatch.setattr("data.source.check.SECONDS", -1)
    assert check_images(images)["looked_at"] == 1


def test_sets_without_files_are_looked_at_too(capsys: pytest.CaptureFixture[str]) -> None:
    labels = np.repeat([0, 1], [400, 200])
    look_at(Images("digits", "train", ["even", "odd"], labels, [Image.new("L", (32, 32))] * 600), RECIPE)
    assert capsys.readouterr().out.splitlines() == [
        "600 images in 2 classes, 200 (odd) to 400 (even) in each",
        "  500 of them looked at: 32 x 32 px; modes: L 500",
    ]


def test_kinds_of_data(folder: Path, tmp_path: Path) -> None:
    assert kind_of(folder) == "folder"
    assert kind_of(Path("cifar10")) == kind_of(Path("uoft-cs/cifar10")) == "hub"
    (tmp_path / "tables" / "data").mkdir(parents=True)
    (tmp_path / "tables" / "data" / "train-00000.parquet").touch()
    assert kind_of(tmp_path / "tables") == kind_of(tmp_path / "tables" / "data") == "hub"
    for missing in ("a/b/c", str(tmp_path / "nowhere"), "../images", "~/images"):
        with pytest.raises(FileNotFoundError, match=r"`data` \(=.*\) must be a folder of images that exists, or "):
            kind_of(Path(missing))
    with pytest.raises(NotADirectoryError, match=r"must be a folder of images, not a file"):
        kind_of(folder / "cat" / "1.png")


def test_the_source_is_kept_by_its_full_path(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_source(tmp_path) == Source()
    monkeypatch.chdir(folder.parent)
    keep_source(tmp_path, Source(Path("images")), {"images": 16})
    assert read_source(tmp_path) == Source(folder)
    moved = folder.rename(tmp_path / "moved")
    keep_source(tmp_path, Source(moved))
    assert read_source(tmp_path) == Source(moved)
    assert json.loads((tmp_path / DATA).read_text())["found"] == {"images": 16}
    keep_source(tmp_path, Source(Path("uoft-cs/cifar10"), 9))
    assert read_source(tmp_path) == Source(Path("uoft-cs/cifar10"), 9)
    for damaged in ("[1]", "{", '{"data": 3}'):
        (tmp_path / DATA).write_text(damaged)
        with pytest.raises(OSError, match=r"data.json is damaged: remove it, and give --data again"):
            read_source(tmp_path)
