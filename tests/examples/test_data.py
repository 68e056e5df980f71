"""Data sets: regions of the photographs, splits of the digits, folders of every shape, damaged files."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from data.images import CELL, SPLITS, load_images, split_columns


def pixels(images):
    return np.stack([np.asarray(images[i][0]) for i in range(len(images))])


def save(path, color=(10, 20, 30), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 8), color).convert(mode).save(path)
    return path


@pytest.mark.parametrize(("split", "count", "least"), [("train", 1509, 40), ("val", 636, 15), ("test", 837, 25)])
def test_photos_have_enough_cells_in_every_split(split, count, least):
    images = load_images("photos", split)
    assert (images.name, images.split, len(images)) == ("photos", split, count)
    assert len(images.classes) == 14
    assert np.bincount(images.labels, minlength=14).min() >= least
    assert images.labels.dtype == np.int64
    image, label = images[count - 1]
    assert (image.mode, image.size, label) == ("RGB", (CELL, CELL), images.labels[-1])


def test_photos_are_the_same_every_time():
    first, second = load_images("photos", "val"), load_images("photos", "val")
    assert np.array_equal(pixels(first), pixels(second))
    assert np.array_equal(first.labels, second.labels)


@pytest.mark.parametrize("size", [(512, 512), (451, 300), (384, 303), (741, 500)])
def test_regions_keep_a_margin_of_a_cell(monkeypatch, size):
    # Every pixel of this "photograph" holds its own coordinates, so the cells tell where they were cut.
    y, x = np.mgrid[: size[1], : size[0]]
    photo = Image.fromarray(np.stack([x % 256, y % 256, 16 * (x // 256) + y // 256], axis=-1).astype(np.uint8))
    monkeypatch.setattr("data.images.load_photo", lambda name: photo)
    monkeypatch.setattr("data.images.PHOTOS", ("one.png",))
    seen = {}
    for split in SPLITS:
        r, g, b = pixels(load_images("photos", split)).astype(int).reshape(-1, 3).T
        positions = list(zip(r + 256 * (b // 16), g + 256 * (b % 16), strict=True))
        assert len(positions) == len(set(positions))  # cells do not overlap
        seen[split] = np.unique([x for x, _ in positions])
    for split in ("val", "test"):
        unused_between = np.abs(seen["train"][:, None] - seen[split]).min() - 1
        assert unused_between >= CELL


def test_blank_cells_are_left_out(monkeypatch):
    grey = np.random.default_rng(0).integers(0, 256, (256, 512), dtype=np.uint8)
    grey[:128] = 7
    monkeypatch.setattr("data.images.load_photo", lambda name: Image.fromarray(grey).convert("RGB"))
    monkeypatch.setattr("data.images.PHOTOS", ("one.png",))
    columns = split_columns(16)
    for split in SPLITS:
        assert len(load_images("photos", split)) == 4 * len(columns[split])


def test_digits_are_split_by_class_without_overlap():
    splits = [load_images("digits", split) for split in SPLITS]
    assert [len(images) for images in splits] == [1077, 360, 360]
    assert np.array_equal(sum(np.bincount(images.labels) for images in splits), np.bincount(load_digits().target))
    for images in splits:
        share = np.bincount(images.labels) / len(images)
        assert np.abs(share - 0.1).max() < 0.005
    everything = [image.tobytes() for images in splits for image, _ in images]
    assert len(set(everything)) == len(everything)
    assert splits[0][0][0].size == (32, 32)


def test_digits_keep_their_labels():
    bunch = load_digits()
    known = {}
    for image, label in zip(bunch.images, bunch.target, strict=True):
        grey = Image.fromarray((image * 255 / 16).round().astype(np.uint8))
        known[grey.resize((32, 32), Image.Resampling.BICUBIC).convert("RGB").tobytes()] = label
    assert all(known[image.tobytes()] == label for image, label in load_images("digits", "test"))


def test_folder_with_splits(tmp_path):
    save(tmp_path / "train/cat/b.jpg", (200, 0, 0))
    save(tmp_path / "train/cat/a.JPEG")
    save(tmp_path / "train/dog/a.png", mode="P")
    save(tmp_path / "test/dog/a.png", mode="L")
    save(tmp_path / "test/eel/a.png", mode="RGBA")
    (tmp_path / "train/cat/notes.txt").write_text("not an image")
    train, test = load_images("folder", "train", data=tmp_path), load_images("folder", "test", data=str(tmp_path))
    assert train.classes == test.classes == ["cat", "dog", "eel"]
    assert train.labels.tolist() == [0, 0, 1]
    assert test.labels.tolist() == [1, 2]
    assert [path.name for path in train.items] == ["a.JPEG", "b.jpg", "a.png"]
    assert {image.mode for images in (train, test) for image, _ in images} == {"RGB"}
    assert train[1][0].getpixel((5, 5))[0] > 190


def test_folder_of_classes_is_the_train_split(tmp_path):
    save(tmp_path / "cat/a.jpg")
    save(tmp_path / "dog/a.jpg")
    assert load_images("folder", "train", data=tmp_path).labels.tolist() == [0, 1]
    with pytest.raises(FileNotFoundError, match="no split folders, so there is no 'val' split: expected PATH/"):
        load_images("folder", "val", data=tmp_path)


def test_bad_names():
    with pytest.raises(ValueError, match=r"`name` \(='imagenet'\) must be one of photos, digits, folder, hub"):
        load_images("imagenet", "train")
    with pytest.raises(ValueError, match=r"`split` \(='valid'\) must be one of train, val, test"):
        load_images("photos", "valid")
    with pytest.raises(ValueError, match=r"`data` \(=None\) must be the path of a folder"):
        load_images("folder", "train")
    with pytest.raises(ValueError, match=r"`data` \(='x'\) is only for the data sets 'folder' and 'hub', not"):
        load_images("photos", "train", data="x")


def test_bad_folders_show_the_expected_tree(tmp_path):
    tree = r"expected PATH/\{train,val,test\}/CLASS/\*.jpg"
    with pytest.raises(FileNotFoundError, match=rf"nowhere'\) is not a folder: {tree}"):
        load_images("folder", "train", data=tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=rf"no images .*{tree}"):
        load_images("folder", "train", data=tmp_path)
    save(tmp_path / "flat.jpg")
    with pytest.raises(FileNotFoundError, match=rf"no images .*{tree}"):
        load_images("folder", "train", data=tmp_path)
    save(tmp_path / "train/cat/a.jpg")
    with pytest.raises(FileNotFoundError, match=rf"has no folder 'test': {tree}"):
        load_images("folder", "test", data=tmp_path)


def bomb():
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("damage", ["empty", "text", "truncated", "bomb"])
def test_unreadable_images_are_named_when_they_are_read(tmp_path, damage):
    save(tmp_path / "cat/a.png")
    bad = save(tmp_path / "cat/bad.png")
    whole = bad.read_bytes()
    bad.write_bytes({"empty": b"", "text": b"hello", "truncated": whole[: len(whole) - 25], "bomb": bomb()}[damage])
    images = load_images("folder", "train", data=tmp_path)
    assert images[0][0].size == (12, 8)
    with pytest.raises(OSError, match=r"cannot read the image '.*bad\.png': "):
        images[1]
