"""Images that cannot be read, or have changed, under a training run."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from config.recipe import load_recipe
from data.images import Images, load_images
from data.loading import load_steps, training_images
from data.source.inventory import images_of_the_run, inventory_of, keep_inventory, read_inventory
from data.unreadable import UNREADABLE, SubstitutedImages, read_unreadable

RECIPE = load_recipe("photos_dino_vmf", {"dataset": "folder", "batch_size": 4, "num_workers": 0})


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for index in range(12):
        (tmp_path / "data" / "ab"[index % 2]).mkdir(parents=True, exist_ok=True)
        colour = (20 * index, 255 - 20 * index, 7)
        Image.new("RGB", (40 + index, 40), colour).save(tmp_path / "data" / "ab"[index % 2] / f"{index}.png")
    (tmp_path / "data" / "a" / "4.png").write_bytes(b"no image")
    (tmp_path / "run").mkdir()
    return tmp_path / "data"


def steps(images: Images, output: Path, *, num_workers: int = 0) -> list[torch.Tensor]:
    loaded = load_steps(images, RECIPE, 0, 0, 3, output, accumulate=1, num_workers=num_workers)
    return [batch["crops"][0] for (batch,) in loaded]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_another_image_takes_the_place_of_one_that_cannot_be_read(
    data: Path, tmp_path: Path, num_workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    images = training_images(RECIPE, data, None)
    found = steps(images, output, num_workers=num_workers)
    assert [len(batch) for batch in found] == [4, 4, 4]
    assert read_unreadable(output) == {"a/4.png"}
    said = [line for line in capsys.readouterr().err.splitlines() if "takes its place" in line]
    assert len(said) == 1
    assert said[0].startswith(f"cannot read the image '{data / 'a' / '4.png'}'")
    steps(images, output)
    assert "takes its place" not in capsys.readouterr().err  # it is known
    assert (output / UNREADABLE).read_text() == "a/4.png\n"
    # It is the next image of the list, with the crops that the unreadable one would have had.
    position = [item.name for item in images.items].index("4.png")
    samples = SubstitutedImages(images, lambda image, rng: (image.size, rng.random()), 0)
    (size, drawn), failures = samples[position]
    assert size == images[position + 1][0].size
    assert drawn != samples[position + 1][0][1]
    assert [index for index, _ in failures] == [position]


def test_a_folder_without_readable_images_ends_the_run(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for index in range(4):
        (tmp_path / "a" / f"{index}.png").write_bytes(b"no image")
    with pytest.raises(OSError, match=r"4 images in a row cannot be read; cannot read the image .*\.png"):
        steps(load_images("folder", "train", data=tmp_path), tmp_path)


def test_a_run_goes_on_after_an_unreadable_image_was_removed(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    images = training_images(RECIPE, data, None)
    keep_inventory(images, output)
    before = steps(images, output)
    (data / "a" / "4.png").unlink()
    resumed = images_of_the_run(training_images(RECIPE, data, None), output)
    assert [item.name for item in resumed.items] == [item.name for item in images.items]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(steps(resumed, output), before, strict=True))
    moved = data.rename(tmp_path / "moved")  # the same images elsewhere are the same images
    assert len(images_of_the_run(training_images(RECIPE, moved, None), output)) == 12


def test_what_has_changed_is_named(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    keep_inventory(training_images(RECIPE, data, None), output)
    assert images_of_the_run(images := training_images(RECIPE, data, None), output) is images
    (data / "b" / "1.png").rename(data / "b" / "new.png")  # of equal count
    (data / "b" / "3.png").write_bytes((data / "b" / "5.png").read_bytes() + b" ")
    changes = r"1 new \(b/new.png\); 1 gone \(b/1.png\); 1 of another size or content \(b/3.png\)"
    message = (
        rf"`data` has changed since the run in '.*run' began with 12 images: {changes}\. "
        r"Give the data as they were; .* write their names into .*unreadable.txt"
    )
    with pytest.raises(ValueError, match=message):
        images_of_the_run(training_images(RECIPE, data, None), output)


def test_names_written_into_the_list_let_a_run_go_on_without_them(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    keep_inventory(training_images(RECIPE, data, None), output)
    (data / "b" / "1.png").unlink()
    with pytest.raises(ValueError, match=r"1 gone \(b/1.png\)"):
        images_of_the_run(training_images(RECIPE, data, None), output)
    (output / UNREADABLE).write_text("b/1.png\n")
    assert len(images_of_the_run(training_images(RECIPE, data, None), output)) == 12


def test_images_without_files_are_compared_by_their_pixels(tmp_path: Path) -> None:
    red, blue = (Image.new("RGB", (4, 4), colour) for colour in ("red", "blue"))
    first, second = (Images("photos", "train", ["a"], np.zeros(1, np.int64), [image]) for image in (red, blue))
    keep_inventory(first, tmp_path)
    assert read_inventory(tmp_path) == inventory_of(first) != inventory_of(second)
    assert images_of_the_run(first, tmp_path) is first
    with pytest.raises(ValueError, match=r"`data` has changed .*: 1 of another size or content \(1 images\)"):
        images_of_the_run(second, tmp_path)


def test_names_are_kept_whatever_they_are(tmp_path: Path) -> None:
    names = ["tab\t1.png", "ümlaut.png", os.fsdecode(b"latin-\xe9.png"), " space .png"]
    items = [Path("/data/a") / name for name in names]
    images = Images("folder", "train", ["a"], np.zeros(4, np.int64), items)
    keep_inventory(images, tmp_path)
    assert list(read_inventory(tmp_path) or {}) == [f"a/{name}" for name in names]


def test_a_damaged_inventory_says_what_to_do(tmp_path: Path) -> None:
    keep_inventory(load_images("digits", "train"), tmp_path)
    path = tmp_path / "images.txt.gz"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(OSError, match=r"images.txt.gz is damaged .*: remove it to go on without a comparison"):
        images_of_the_run(load_images("digits", "train"), tmp_path)
