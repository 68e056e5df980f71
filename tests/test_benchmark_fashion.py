"""`python -m benchmarks fashion` reads the four files, trains every cell, and goes on where it stopped."""

import dataclasses
import gzip
import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks import results
from benchmarks.fashion import data, run, stability
from benchmarks.fashion.data import random_crops
from benchmarks.fashion.evaluate import evaluate, nearest_neighbours
from benchmarks.fashion.folder import CLASSES, fashion_folder
from benchmarks.fashion.train import Settings, Trained, train

from data.images import load_images

TINY = Settings(steps=3, batch=8, prototypes=12, bottleneck=4, hidden=8, widths=(4, 4, 4), warmup=1)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    """200 training and 50 test images in the files of Fashion-MNIST; an image is as bright as its class says."""
    rng = np.random.default_rng(0)
    for images, labels, count in ((*data.FILES[:2], 200), (*data.FILES[2:], 50)):
        classes = np.arange(count) % 10
        pixels = rng.integers(0, 20, (count, 28, 28)) + 20 * classes[:, None, None]
        header = struct.pack(">BBBBIII", 0, 0, 8, 3, count, 28, 28)
        (tmp_path / f"{images}.gz").write_bytes(gzip.compress(header + pixels.astype(np.uint8).tobytes()))
        (tmp_path / labels).write_bytes(struct.pack(">BBBBI", 0, 0, 8, 1, count) + classes.astype(np.uint8).tobytes())
    monkeypatch.setattr(data, "VALIDATION", 50)
    return tmp_path


def test_the_splits_are_those_of_the_files(folder: Path) -> None:
    splits = data.load(folder)
    assert {name: len(images.x) for name, images in splits.items()} == {"train": 150, "val": 50, "test": 50}
    assert splits["val"].labels[:10].tolist() == list(range(10))
    brightness = splits["test"].x.mean((1, 2, 3))
    assert torch.equal(brightness[:10].argsort(), splits["test"].labels[:10])


def test_a_folder_of_images_has_the_same_splits(folder: Path, tmp_path: Path) -> None:
    fashion_folder(tmp_path / "images", data=folder, images=40)
    arrays = data.load_arrays(folder)
    for split in ("train", "val", "test"):
        images = load_images("folder", split, data=tmp_path / "images")
        assert (len(images), sorted(images.classes)) == (40, sorted(CLASSES))
        for item, (image, label) in zip(images.items, images, strict=True):
            number = int(Path(str(item)).stem)
            assert CLASSES[arrays[split][1][number]] == images.classes[label]
            assert np.array_equal(np.asarray(image.convert("L")), arrays[split][0][number])
    with pytest.raises(FileExistsError, match=r"`output` \(=.*images'\) must be a folder that does not exist yet"):
        fashion_folder(tmp_path / "images", data=folder)
    with pytest.raises(ValueError, match=r"`images` \(=0\) must be at least 1"):
        fashion_folder(tmp_path / "none", data=folder, images=0)


def test_crops_of_an_even_image_are_even_and_half_are_mirrored() -> None:
    generator = torch.Generator().manual_seed(0)
    even = random_crops(torch.ones(16, 1, 28, 28), (0.3, 1.0), generator, strength=0.0)
    torch.testing.assert_close(even[:, :, 2:-2, 2:-2], torch.ones(16, 1, 24, 24))
    ramp = torch.linspace(0, 1, 28).expand(400, 1, 28, 28)
    crops = random_crops(ramp, (0.3, 0.9), generator, strength=0.0)
    rising = (crops[..., -4] > crops[..., 3]).all(dim=(1, 2)).float().mean()
    assert 0.4 < rising < 0.6
    assert crops.std(0).mean() > 0.05, "the crops differ"


def test_the_nearest_neighbours_vote() -> None:
    bank = torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1], [-1, 0]])
    labels = torch.tensor([3, 3, 1, 1, 0])
    found = nearest_neighbours(bank, labels, torch.tensor([[2.0, 0.2], [0.0, 5.0], [-3.0, 0.0]]), k=2)
    assert found.tolist() == [3, 1, 0]


@pytest.mark.parametrize("options", run.ARMS.values(), ids=run.ARMS)
def test_every_cell_trains_and_only_free_norms_move(folder: Path, options: dict) -> None:
    splits = data.load(folder)
    trained = train(dataclasses.replace(TINY, **options), splits["train"], seed=0)
    found = evaluate(trained, splits["train"], splits["test"])
    assert len(trained.losses) == TINY.steps
    assert sum(found["knn_by_fifth"]) / 5 == pytest.approx(found["knn"])
    assert (found["kappa_min"] < found["kappa_max"]) is (options["normalization"] != "l2")
    assert len(found["used_over_time"]) == TINY.steps
    assert all(1 / 12 <= share <= 1 for share in found["used_over_time"])
    for unique, largest in zip(found["unique"], found["largest_set"], strict=True):
        assert 1 / 12 <= largest <= 1 + 1 / 12 - unique + 1e-9, "those outside the largest set, and one of it, at most"
    assert trained.teacher.head.normalizer == ("vmf" if options["normalization"] == "vmf" else "none")


def test_the_command_goes_on_where_it_stopped(folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    arms = list(run.ARMS)[:2]
    monkeypatch.setattr(run, "Settings", lambda **options: dataclasses.replace(TINY, **options))
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    run.fashion(arms=tuple(arms), seeds=(0,), data=folder, output=tmp_path)
    capsys.readouterr()
    run.fashion(arms=tuple(arms), seeds=(0, 1), data=folder, output=tmp_path)
    assert "seed 0" not in capsys.readouterr().out
    found = json.loads(next((tmp_path / "results").iterdir()).read_text())
    assert [(row["seed"], row["arm"]) for row in found["rows"]] == [(seed, arm) for seed in (0, 1) for arm in arms]
    assert 0 <= found["raw_pixels_knn"] <= 1
    assert len(found["untrained_knn"]) == 2


def test_a_loss_that_is_not_finite_ends_the_training_and_is_reported(folder: Path, monkeypatch) -> None:
    images = data.load(folder)["train"]
    quiet = stability.quietness(train(TINY, images, seed=0))
    assert (quiet["finite"], quiet["steps_done"]) == (True, TINY.steps)
    assert 0.9 < quiet["largest_norm"] < 1.2
    assert math.isfinite(quiet["largest_gradient"])
    broken = stability.quietness(train(dataclasses.replace(TINY, lr=1e30), images, seed=0))
    assert (broken["finite"], broken["steps_done"], broken["spike"]) == (False, 2, None)


def test_a_rise_of_the_loss_is_seen() -> None:
    losses = [2.0] * 150 + [5.0] * 20 + [2.0] * 130
    trained = Trained(None, None, None, losses=losses, gradients=[1.0], largest_norm=[2.0, 3.0])
    found = stability.quietness(trained)
    assert (found["spike"], found["largest_norm"]) == (pytest.approx(3.0), 3.0)


def test_the_stability_grid_runs_every_change_for_every_contender(folder: Path, tmp_path: Path, monkeypatch) -> None:
    settings = [Settings(**run.ARMS[arm], **change) for arm in stability.COMPARED for change in stability.CHANGES]
    assert len(set(settings)) == len(stability.COMPARED) * len(stability.CHANGES)
    monkeypatch.setattr(stability, "Settings", lambda **options: dataclasses.replace(TINY, **options | {"steps": 2}))
    monkeypatch.setattr(stability, "CHANGES", ({}, {"clip": 0.0}))
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    for seeds in ((0,), (0, 1)):  # the second time, what is there is not done again
        stability.fashion_stability(seeds=seeds, changes=(0, 1), data=folder, output=tmp_path)
    rows = json.loads(next((tmp_path / "results").iterdir()).read_text())["rows"]
    assert [(row["seed"], row["clip"], row["arm"]) for row in rows] == [
        (seed, clip, arm) for seed in (0, 1) for clip in (3.0, 0.0) for arm in stability.COMPARED
    ]
    assert len((tmp_path / "fashion_stability.jsonl").read_text().splitlines()) == len(rows)
