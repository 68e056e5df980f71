"""The stages of `python -m benchmarks augment` add up, and the last one is DINO's whole augmentation."""

import random

import pytest
import torch
from benchmarks import augment as benchmark

from data.augment import MultiCrop


def test_the_last_stage_is_the_whole_augmentation(monkeypatch: pytest.MonkeyPatch) -> None:
    files = benchmark.encoded_photos()[:2]
    seen = {}
    call = MultiCrop.__call__
    monkeypatch.setattr(
        MultiCrop, "__call__", lambda self, image, rng: seen.update({image.size: call(self, image, rng)})
    )
    calls = benchmark.stages(2, files)
    assert list(calls) == list(benchmark.STAGES)
    calls["decode"][0]()
    assert not seen
    calls["blur, solarise"][0]()
    expected = call(MultiCrop(num_local=2), benchmark.decoded(files[-1]), random.Random(len(files) - 1))
    for ours, theirs in zip(seen[benchmark.SIZE], expected, strict=True):
        assert torch.equal(ours, theirs)


def test_shares_add_up() -> None:
    *stages, whole = benchmark.shares({"decode": 0.010, "crop": 0.025, "colour": 0.040})
    assert [row["milliseconds"] for row in stages] == [10, 15, 15]
    assert [row["share"] for row in stages] == [0.25, 0.375, 0.375]
    assert whole == {"stage": "all", "milliseconds": 40, "images_per_second": 25}
    assert "| crop | 15.0 | 38% |" in benchmark.table([*stages, whole])
