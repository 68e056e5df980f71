"""Images of every mode as 8-bit RGB, and what a folder holds besides the images that are used."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from data.files import open_rgb, to_rgb
from data.images import load_images

RAMP = np.arange(0, 256, dtype=np.uint8).reshape(16, 16)


def as_file(image: Image.Image, kind: str, **options: object) -> io.BytesIO:
    image.save(file := io.BytesIO(), kind, **options)
    file.seek(0)
    return file


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (RAMP, "PNG"),
        (RAMP.astype(np.uint16) * 257, "PNG"),  # PIL's own conversion: nearly all white
        (RAMP.astype(np.uint16) * 257, "TIFF"),
        (RAMP.astype(np.int32), "TIFF"),
        (RAMP.astype(np.int32) * 257, "TIFF"),
        (RAMP.astype(np.float32) / 255, "TIFF"),  # PIL's own conversion: all black
        (RAMP.astype(np.float32), "TIFF"),
        (RAMP.astype(np.float32) * 257, "TIFF"),
    ],
)
def test_grey_images_of_every_depth_are_the_same_picture(values: np.ndarray, kind: str) -> None:
    found = open_rgb(as_file(Image.fromarray(values), kind))
    assert found.mode == "RGB"
    assert np.array_equal(np.asarray(found), np.stack([RAMP] * 3, axis=-1))


def test_a_dark_16_bit_image_stays_dark() -> None:
    found = open_rgb(as_file(Image.fromarray(np.full((4, 4), 600, np.uint16)), "PNG"))
    assert np.unique(np.asarray(found)).tolist() == [2]  # 600 / 257


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 1e6])
def test_values_of_no_known_range_are_refused(value: float) -> None:
    values = RAMP.astype(np.float32)
    values[3, 3] = value
    with pytest.raises(OSError, match=r"cannot read x.tif: values from .* are in none of the ranges 0 to 1, 255, "):
        open_rgb(as_file(Image.fromarray(values), "TIFF"), "x.tif")


def test_colours_of_every_mode_are_the_same_picture() -> None:
    red, blue = Image.new("RGB", (8, 8), (250, 10, 10)), (10, 10, 250)
    red.paste(blue, (4, 0, 8, 8))
    for mode, kind in [
        ("P", "PNG"),
        ("P", "GIF"),
        ("CMYK", "TIFF"),
        ("RGBA", "PNG"),
        ("RGB", "WEBP"),
        ("YCbCr", "JPEG"),
    ]:
        image = red.quantize(2) if mode == "P" else red.convert(mode)
        options = {"lossless": True} if kind == "WEBP" else {"quality": 100} if kind == "JPEG" else {}
        found = np.asarray(open_rgb(as_file(image, kind, **options))).astype(int)
        assert np.abs(found[:, 1] - [250, 10, 10]).max() <= 12, (mode, kind)
        assert np.abs(found[:, 6] - [10, 10, 250]).max() <= 12, (mode, kind)


def test_what_is_transparent_is_white() -> None:
    black = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    black.putpixel((1, 0), (0, 0, 0, 255))
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 0, 0, 0])
    palette.putpixel((1, 0), 1)
    for file in (as_file(black, "PNG"), as_file(black.convert("LA"), "PNG"), as_file(palette, "PNG", transparency=0)):
        assert np.asarray(open_rgb(file)).tolist() == [[[255] * 3, [0] * 3]]


def test_images_of_phones_with_several_pictures_are_read() -> None:
    red = Image.new("RGB", (8, 8), "red")
    assert open_rgb(as_file(red, "MPO", save_all=True, append_images=[red])).getpixel((0, 0))[0] > 250


def test_nothing_is_given_to_ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("a program was started"))
    path = tmp_path / "image.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n%%EOF\n")
    with Image.open(path) as image:
        assert image.format == "EPS"  # whatever the name says
    with pytest.raises(OSError, match=r"cannot read the image '.*image.png': cannot identify image file"):
        open_rgb(path)


def test_an_image_stands_upright() -> None:
    picture = np.asarray(Image.fromarray(RAMP[:, :8]).convert("RGB"))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise
    stored = Image.fromarray(np.rot90(picture).copy())
    for kind, options in (("PNG", {}), ("JPEG", {"quality": 100}), ("TIFF", {})):
        found = open_rgb(as_file(stored, kind, exif=exif, **options))
        assert found.size == (8, 16)
        assert np.abs(np.asarray(found).astype(int) - picture).max() <= 8
    broken = as_file(stored, "PNG", exif=b"Exif\0\0MM\0*\0\0\xff\xff no EXIF data")
    assert open_rgb(broken).size == (16, 8)
    assert np.array_equal(np.asarray(to_rgb(Image.fromarray(picture))), picture)


def save(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (9, 9, 9)).save(path)


def test_nothing_in_a_folder_is_left_out_in_silence(tmp_path: Path) -> None:
    for name in (
        "cat/a.png",
        "cat/b.gif",
        "cat/more/c.png",
        "cat/more/d/e.jpg",
        "dog/a.png",
    ):
        save(tmp_path / "train" / name)
    for name in ("train/loose.png", "test/eel/a.png", "test/cat/a.png"):
        save(tmp_path / name)
    for name in ("train/cat/._a.png", "train/__MACOSX/._a.png", "train/.ipynb_checkpoints/a.png", "train/.DS_Store"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"no image")
    for name in ("a.heic", "b.heic", "labels.csv", "README"):
        (tmp_path / "train/dog" / name).write_bytes(b"something")
    train, test = load_images("folder", "train", data=tmp_path), load_images("folder", "test", data=tmp_path)
    assert train.classes == test.classes == ["cat", "dog", "eel"]
    assert [item.name for item in train.items] == ["a.png", "b.gif", "a.png"]
    assert train.notes == (
        "1 images are in no class folder and left out (loose.png)",
        "2 images are in folders inside a class folder and left out (cat/more/c.png, cat/more/d/e.jpg)",
        "1 hidden files are no images and left out (._a.png)",
        "4 files are of no known image type and left out (.csv 1, .heic 2, no suffix 1)",
        "1 of 3 classes have no train images (eel)",
    )
    assert test.notes == ("1 of 3 classes have no test images (dog)",)


def test_split_folders_of_another_name_are_explained(tmp_path: Path) -> None:
    for name in ("training/cat/a.png", "validation/cat/b.png"):
        save(tmp_path / name)
    message = (
        r"no images .* in .*expected PATH/.*Here 2 images are in folders inside a class folder .*training/cat/a.png"
    )
    with pytest.raises(FileNotFoundError, match=message):
        load_images("folder", "train", data=tmp_path)
