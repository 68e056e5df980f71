"""Scenes of photographs have exact masks, and docs/evaluation.md shows what networks make of them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks import results
from benchmarks.segmentation import run, scenes
from PIL import Image

from data.images import PHOTOS
from evaluators.dense.segmentation.folder import load_pairs


def test_the_page_shows_the_committed_results() -> None:
    page = run.DOCS.read_text()
    assert "<!-- table: segmentation photographs -->" in page
    assert run.rendered(page) == page, "run `python -m benchmarks segmentation`"


def test_the_page_says_what_the_results_hold() -> None:
    rows = results.latest("segmentation")["rows"]

    def gain(arm: str, metric: str) -> float:
        untrained = {row["seed"]: row[metric] for row in rows if row["arm"] == run.UNTRAINED}
        gains = [row[metric] - untrained[row["seed"]] for row in rows if row["arm"] == arm]
        assert len(gains) == len(untrained) >= 3
        return 100 * np.mean(gains)

    for arm in list(run.ARMS)[2:]:
        assert 1 < gain(arm, "linear_mIoU") < 2.5
        assert gain(arm, "knn_mIoU") < 0.5


def test_every_pixel_is_of_the_photograph_that_the_mask_names() -> None:
    """Strip k has the colours 10 k and 10 k + 9 in turn."""
    rng = np.random.default_rng(0)
    pattern = 9 * (np.indices((70, 66)).sum(axis=0) % 2)
    strips = [Image.fromarray((10 * number + pattern).astype(np.uint8)).convert("RGB") for number in range(14)]
    shown = []
    for _ in range(20):
        image, mask = (np.asarray(made) for made in scenes.scene(strips, rng))
        assert image.shape == (*mask.shape, 3) == (64, 64, 3)
        assert np.array_equal(image[..., 0] // 10, mask)
        shown.append(len(np.unique(mask)))
    assert max(shown) == 4
    assert min(shown) >= 2


def test_splits_show_other_parts_of_the_photographs(tmp_path: Path) -> None:
    for name in PHOTOS:
        strips = [np.asarray(scenes.strip(name, split)) for split in ("test", "train", "val")]
        whole = np.asarray(scenes.load_photo(name))
        assert sum(strip.shape[1] for strip in strips) <= whole.shape[1] - 2 * scenes.CELL
        assert np.array_equal(strips[0], whole[:, : strips[0].shape[1]])
    for folder in ("one", "two"):
        scenes.photo_scenes(tmp_path / folder, train=2, val=1, test=1)
    for split, count in {"train": 2, "val": 1, "test": 1}.items():
        one, two = (load_pairs(tmp_path / folder, split) for folder in ("one", "two"))
        assert len(one) == count
        assert all(a.image.read_bytes() == b.image.read_bytes() for a, b in zip(one, two, strict=True))
    with pytest.raises(FileExistsError, match=r"`output` \(='.*one'\) must be a folder that does not exist yet"):
        scenes.photo_scenes(tmp_path / "one")
    with pytest.raises(ValueError, match=r"`val` \(=0\) must be at least 1"):
        scenes.photo_scenes(tmp_path / "three", val=0)


def test_the_command_goes_on_and_fills_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def evaluate(request, protocol, options):
        asked.append((Path(request.checkpoint).name, request.features))
        values = {"knn_mIoU": 0.25, "knn_pixel_accuracy": 0.4, "linear_mIoU": 0.2, "linear_pixel_accuracy": 0.3}
        rows = [
            {"protocol": protocol, "features": request.features, "split": request.split, "metric": metric}
            | {"value": value + 0.02 * int(request.checkpoint[-1]), "C": 0.1, "seconds": 1.0}
            for metric, value in values.items()
        ]
        request.output.mkdir(parents=True, exist_ok=True)
        with (request.output / "results.jsonl").open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        return rows

    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table: segmentation photographs -->\n<!-- end -->\nafter\n")
    monkeypatch.setattr(run, "evaluate", evaluate)
    monkeypatch.setattr(run, "DOCS", page)
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    (tmp_path / "out/scenes").mkdir(parents=True)
    for seeds in ((0,), (0, 1)):
        run.segmentation(runs=tmp_path / "runs", seeds=seeds, output=tmp_path / "out")
    assert asked[:2] == [("photos_dino-seed0", "pixels"), ("photos_dino-seed0", "random")]
    assert len(asked) == len(set(asked)) == 1 + 2 * 5
    assert "| raw pixels |  | 25.0 |  | 40.0 | 20.0 |  | 30.0 |" in page.read_text()
    assert "| DINO-vMF | 2 | 26.0±1.0 | +0.0±0.0 | 41.0±1.0 | 21.0±1.0 | +0.0±0.0 | 31.0±1.0 |" in page.read_text()
