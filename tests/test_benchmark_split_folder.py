"""`python -m benchmarks split-folder` copies each image of a class once, in the order of names."""

from pathlib import Path

import pytest
from benchmarks.split_folder import split_folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for label, count in (("a", 6), ("b", 7)):
        folder = tmp_path / "source" / label
        folder.mkdir(parents=True)
        for number in range(count):
            (folder / f"{number}.png").write_text(f"{label}{number}")
        (folder / ".hidden.png").touch()
        (folder / "notes.txt").touch()
    return tmp_path / "source"


def contents(folder: Path) -> list[str]:
    return sorted(f"{path.parent.name}: {path.read_text()}" for path in folder.rglob("*.*"))


def test_val_and_test_are_the_last_of_each_class(source: Path, tmp_path: Path) -> None:
    split_folder(source, tmp_path / "all", val=2, test=1)
    assert contents(tmp_path / "all" / "train") == ["a: a0", "a: a1", "a: a2", "b: b0", "b: b1", "b: b2", "b: b3"]
    assert contents(tmp_path / "all" / "val") == ["a: a3", "a: a4", "b: b4", "b: b5"]
    assert contents(tmp_path / "all" / "test") == ["a: a5", "b: b6"]


def test_a_test_set_of_its_own_and_fewer_training_images(source: Path, tmp_path: Path) -> None:
    split_folder(source, tmp_path / "few", train=1, val=1, test_from=source)
    assert contents(tmp_path / "few" / "train") == ["a: a0", "b: b0"]
    assert contents(tmp_path / "few" / "val") == ["a: a5", "b: b6"]
    assert len(contents(tmp_path / "few" / "test")) == 13


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"val": 3, "test": 3},
            ValueError,
            r"`source` \(=.*\) must have more than 6 images in each class, but a has 6",
        ),
        ({"val": 1}, ValueError, r"`test` \(=None\) or `test_from` \(=None\) must be given, and not both"),
        ({"val": 0, "test": 1}, ValueError, r"`val` \(=0\) must be at least 1"),
        (
            {"val": 1, "test_from": Path("none")},
            FileNotFoundError,
            r"`test_from` \(='none'\) must be a folder of class folders",
        ),
    ],
)
def test_what_is_refused(source: Path, tmp_path: Path, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        split_folder(source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    with pytest.raises(FileExistsError, match="must be a folder that does not exist yet"):
        split_folder(source, source, val=1, test=1)
