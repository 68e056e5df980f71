"""Which images meet in a step, and which of them a process takes."""

import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from config.recipe import load_recipe
from data import loading
from data.loading import epoch_batches, load_steps, own_parts, training_images


def test_batches_are_a_permutation_of_the_images_drawn_from_seed_and_epoch() -> None:
    batches = epoch_batches(103, 10, seed=0, epoch=1)
    assert batches.shape == (10, 10)
    assert len(np.unique(batches)) == 100
    assert np.array_equal(batches, epoch_batches(103, 10, seed=0, epoch=1))
    assert not np.array_equal(batches, epoch_batches(103, 10, seed=0, epoch=2))
    assert not np.array_equal(batches, epoch_batches(103, 10, seed=1, epoch=1))


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 1), (1, 3), (4, 1), (2, 3)])
def test_the_parts_of_all_processes_are_the_batches(
    world_size: int, accumulate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = epoch_batches(60, 12, seed=0, epoch=0)
    monkeypatch.setattr(loading, "world_size", lambda: world_size)
    parts = []
    for rank in range(world_size):
        monkeypatch.setattr(loading, "rank", lambda rank=rank: rank)
        parts.append(own_parts(steps, accumulate))
    assert {len(micro_batch) for part in parts for micro_batch in part} == {12 // (world_size * accumulate)}
    for step, batch in enumerate(steps):
        taken = [image for part in parts for own in part[step * accumulate : (step + 1) * accumulate] for image in own]
        assert sorted(taken) == sorted(batch)


def test_the_rest_of_an_epoch_is_what_the_whole_would_have_given(tmp_path: Path) -> None:
    recipe = load_recipe("photos_dino_vmf", {"dataset": "digits", "batch_size": 8})
    images = training_images(recipe, None, None)
    whole = list(load_steps(images, recipe, 1, 0, 4, tmp_path, accumulate=2, num_workers=0))
    rest = list(load_steps(images, recipe, 1, 3, 4, tmp_path, accumulate=2, num_workers=0))
    assert [len(step) for step in whole] == [2] * 4
    for ours, theirs in zip(rest[0], whole[3], strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(ours["crops"], theirs["crops"], strict=True))


def test_a_signal_to_the_process_group_does_not_reach_loader_processes(tmp_path: Path) -> None:
    recipe = load_recipe("photos_dino_vmf", {"dataset": "digits", "batch_size": 8})
    before = multiprocessing.active_children()
    steps = load_steps(training_images(recipe, None, None), recipe, 0, 0, 8, tmp_path, accumulate=1, num_workers=2)
    next(steps)
    next(steps)  # now both have started
    own = [process for process in multiprocessing.active_children() if process not in before]
    groups = [os.getpgid(process.pid) for process in own]
    assert len(groups) == 2
    assert os.getpgrp() not in groups


def test_the_rest_of_an_epoch_of_a_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.05)
    (tmp_path / "set").mkdir()
    for grey in range(24):
        Image.new("L", (12, 12), 10 * grey).save(tmp_path / "set" / f"{grey}.png")
    recipe = load_recipe("photos_dino_vmf", {"dataset": "stream", "batch_size": 8})
    images = training_images(recipe, tmp_path / "set", 24)
    whole = list(load_steps(images, recipe, 1, 0, 3, tmp_path, accumulate=2, num_workers=0))
    rest = list(load_steps(images, recipe, 1, 2, 3, tmp_path, accumulate=2, num_workers=0))
    assert [[len(batch["crops"][0]) for batch in step] for step in whole] == [[4, 4]] * 3
    torch.testing.assert_close(rest[0], whole[2], rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"`batch_size` \(=8\) must be at most the number of images \(=7\)"):
        training_images(recipe, tmp_path / "set", 7)
    with pytest.raises(ValueError, match="part 24 of 25 of the stream holds no image: use fewer loader processes"):
        next(images.part(24, 25, seed=0, epoch=0))


def test_a_stream_needs_a_name() -> None:
    recipe = load_recipe("photos_dino_vmf", {"dataset": "stream"})
    with pytest.raises(ValueError, match=r"`data` \(=None\) must be the name of an image set"):
        training_images(recipe, None, None)
