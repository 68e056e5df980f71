"""The stages of `python -m benchmarks augment` add up to DINO's whole augmentation; docs/examples.md quotes them."""

import random
from pathlib import Path

import pytest
import torch
from benchmarks import augment as benchmark

from data.augment import MultiCrop


def test_the_last_stage_is_the_whole_augmentation() -> None:
    files = benchmark.encoded_photos()[:2]
    calls = benchmark.stages(files)
    assert tuple(calls) == benchmark.STAGES
    assert [image.size for image in calls[benchmark.DECODE]()] == [benchmark.SIZE] * 2
    assert [crop.dtype for crop in calls[benchmark.CROP]()["crops"]] == [torch.uint8] * 10
    found = calls[benchmark.CHANGE]()["crops"]
    for number, file in enumerate(files):
        expected = MultiCrop()(benchmark.decoded(file), random.Random(number))
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours[number], theirs, rtol=0, atol=1e-5)


def test_shares_add_up() -> None:
    seconds = {"decode": 0.010, benchmark.CROP: 0.025, "colour": 0.040, benchmark.PEER: 0.100}
    *stages, whole, loader, peer = benchmark.shares(seconds)
    assert [row["milliseconds"] for row in stages] == [10, 15, 15]
    assert [row["share"] for row in stages] == [0.25, 0.375, 0.375]
    assert whole == {"stage": "all", "milliseconds": 40, "images_per_second": 25}
    assert (loader["milliseconds"], peer["milliseconds"]) == (25, 100)
    result = {"device": "X", "versions": {"torch": "2", "pillow": "1"}, "date": "D", "peer": "torchvision 0"}
    text = benchmark.table({**result, "rows": [*stages, whole, loader, peer]})
    assert "| colour | 15.0 | 38% |" in text
    assert "| `augment_on: device`, the loader's part | 25.0 | 40 | 4.00 |" in text
    assert "DINO's own" not in benchmark.table({**result, "rows": [*stages, whole, loader]})


@pytest.mark.parametrize("imports", [True, False])
def test_another_python_takes_its_turns(imports: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    python = tmp_path / "python"
    turns = 'echo "torchvision 0"; while read line; do ls "$2" > ' + str(tmp_path / "seen") + "; echo done; done"
    python.write_text(f"#!/bin/sh\n{turns if imports else 'exit 1'}\n")
    python.chmod(0o755)
    with benchmark.peer_pipeline(str(python), [b"a", b"b"]) as (versions, call):
        if imports:
            assert versions == "torchvision 0"
            call()
            call()
            assert (tmp_path / "seen").read_text().split() == ["00.jpg", "01.jpg"]
        else:
            assert (versions, call) == (None, None)
    assert ("does not import torchvision" in capsys.readouterr().err) is not imports
    with benchmark.peer_pipeline(str(tmp_path / "nothing"), []) as (versions, call):
        assert (versions, call) == (None, None)


def test_the_page_shows_what_was_measured() -> None:
    page = benchmark.DOCS.read_text()
    assert "<!-- table: augment stages -->" in page
    assert benchmark.rendered(page) == page, "run `python -m benchmarks augment`"
