"""Files that outlive a process: damaged ones are recognised, half-written ones replaced, cut lines left out."""

import pickle
import random
import zipfile
from pathlib import Path

import pytest
import torch

from storage.checksums import check_checksums, write_checksums
from storage.json_lines import append_rows, read_rows
from storage.torch_file import UnreadableFile, read_torch_file
from storage.whole_file import whole_file, whole_folder


def test_a_flipped_bit_is_found_wherever_it_changes_anything(tmp_path: Path) -> None:
    content = {"step": 7, "weights": {name: torch.randn(40, 30) for name in "ab"}, "names": ["one", "two"]}
    torch.save(content, tmp_path / "file.pt")
    whole = (tmp_path / "file.pt").read_bytes()
    rng, found = random.Random(0), 0
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        (tmp_path / "file.pt").write_bytes(damaged)
        try:
            read = read_torch_file(tmp_path / "file.pt")
        except UnreadableFile:
            found += 1
        else:  # the bit was in a date or in the padding
            assert (read["step"], read["names"]) == (7, ["one", "two"])
            assert all(torch.equal(read["weights"][name], value) for name, value in content["weights"].items())
    assert found > 200


def test_a_file_that_was_cut_off_is_damaged(tmp_path: Path) -> None:
    torch.save({"weights": torch.randn(100)}, tmp_path / "file.pt")
    whole = (tmp_path / "file.pt").read_bytes()
    for size in range(2, len(whole), 97):
        (tmp_path / "file.pt").write_bytes(whole[:size])
        with pytest.raises(UnreadableFile, match=r"file.pt is damaged, or its end is missing"):
            read_torch_file(tmp_path / "file.pt")


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "empty"),
        (b"\0" * 4096, "filled with zeros, as a crash can leave a file behind"),
        (b"<!DOCTYPE html><html><body>404", "a web page, as a failed download leaves it"),
        (b"<html>\n", "a web page"),
        (b"Not Found\n", r"text \('Not Found'\)"),
        ("é".encode() * 300, r"text \('é+'\)"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
        (pickle.dumps({"weights": [1, 2, 3]}), "a pickle, whose unpickling can run code and which is not opened"),
        (bytes(range(130, 255)) * 9, "something else"),
    ],
)
def test_other_files_are_called_what_they_are(content: bytes, kind: str, tmp_path: Path) -> None:
    (tmp_path / "file.pt").write_bytes(content)
    with pytest.raises(UnreadableFile, match=rf"file.pt is no PyTorch file but {kind}"):
        read_torch_file(tmp_path / "file.pt")


def test_other_zip_files_are_called_what_they_are(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "file.pt", "w") as archive:
        archive.writestr("[Content_Types].xml", "of a text processor")
    with pytest.raises(UnreadableFile, match=r"no PyTorch file but another zip file \(\[Content_Types\].xml\)"):
        read_torch_file(tmp_path / "file.pt")
    zipfile.ZipFile(tmp_path / "file.pt", "w").close()
    with pytest.raises(UnreadableFile, match=r"no PyTorch file but another zip file \(empty\)"):
        read_torch_file(tmp_path / "file.pt")


def test_an_error_of_unpickling_without_words_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise pickle.UnpicklingError

    torch.save({}, tmp_path / "file.pt")
    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(UnreadableFile, match=r"PyTorch says: nothing$"):
        read_torch_file(tmp_path / "file.pt")


def test_files_of_old_torch_are_read(tmp_path: Path) -> None:
    torch.save({"weights": torch.ones(3)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(read_torch_file(tmp_path / "old.pth")["weights"], torch.ones(3))


def test_a_file_is_whole_or_the_one_that_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write(last: BaseException | None) -> None:
        with whole_file(path) as file:
            file.write(b"new")
            if last:
                raise last

    for error in (ValueError("a mistake"), KeyboardInterrupt("a mistake")):
        with pytest.raises(type(error), match="a mistake"):
            write(error)
        assert [found.name for found in tmp_path.iterdir()] == ["file"]
        assert path.read_bytes() == b"old"
    (tmp_path / "file.partial").write_bytes(b"what a killed process leaves, and longer than the new one")
    write(None)
    assert path.read_bytes() == b"new"


def test_a_folder_is_whole_or_the_one_that_was_there(tmp_path: Path) -> None:
    (tmp_path / "folder.partial").mkdir()  # of a process that was killed
    (tmp_path / "folder.partial" / "half").touch()
    for name in ("first", "second"):
        with whole_folder(tmp_path / "folder") as folder:
            (folder / name).touch()
        assert [path.name for path in (tmp_path / "folder").iterdir()] == [name]

    def fail() -> None:
        with whole_folder(tmp_path / "folder"):
            raise ValueError("a mistake")

    with pytest.raises(ValueError, match="a mistake"):
        fail()
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["folder", "folder/second"]


def test_every_flipped_bit_in_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(bytes(range(256)))
    (tmp_path / "two").write_text("two")
    write_checksums(tmp_path)
    check_checksums(tmp_path)
    for path in tmp_path.iterdir():
        whole = path.read_bytes()
        for place in range(0, len(whole), 3):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << place % 8
            path.write_bytes(damaged)
            with pytest.raises(UnreadableFile, match=rf"{path.name} is( damaged|$)|checksum in .*{path.name} is"):
                check_checksums(tmp_path)
        path.write_bytes(whole)
    check_checksums(tmp_path)


@pytest.mark.parametrize("listing", ["", "no checksum\n", f"{'0' * 64}  ../one\n", f"{'0' * 64}  /etc/passwd\n"])
def test_a_list_of_checksums_names_files_of_its_folder_alone(listing: str, tmp_path: Path) -> None:
    (tmp_path / "SHA256SUMS").write_text(listing)
    with pytest.raises(UnreadableFile, match=r"SHA256SUMS is damaged: it must hold a checksum and the name of a file"):
        check_checksums(tmp_path)


def test_a_line_that_was_cut_off_costs_that_line_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results" / "rows.jsonl"
    assert read_rows(path) == []
    append_rows(path, [{"n": 1}, {"n": 2}])
    path.write_bytes(path.read_bytes() + b'{"n": 3, "nam')  # killed while it wrote, or the disk was full
    append_rows(path, [{"n": 4}])
    path.write_bytes(path.read_bytes() + b"\xff\xfe\n[5]\n")
    append_rows(path, [{"n": 6}])
    assert capsys.readouterr().err == ""
    assert [row["n"] for row in read_rows(path)] == [1, 2, 4, 6]
    assert capsys.readouterr().err == f"{path}: line 3, 5, 6 is damaged and left out\n"


def test_a_full_disk_is_an_error_of_appending_too() -> None:
    with pytest.raises(OSError, match="No space left on device"):
        append_rows(Path("/dev/full"), [{"n": 1}])
