"""Runs that are watched: the same losses, more numbers, and a page of curves."""

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

import pretrain
from data.images import Images
from data.stream import ImageStream
from pretrain import Options
from storage.json_lines import read_rows
from tiny_run import TINY_RUN
from training.log import METRICS, summary
from watched_run import folder_without_val, pictures, tiny_method
from watching.curves import PANELS, Curve, read_curves, thinned, write_curves
from watching.sample import choose, draw_sample, features
from watching.watcher import Watcher

MEASURES = {"knn_top1", "linear_top1", "rankme", "lidar", "alpha_req", "feature_std"}
TINY = (*TINY_RUN, "epochs=1", "freeze_last_layer_epochs=0", "drop_path=0.2")


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_a_watched_run_has_the_same_losses_and_goes_on_when_it_is_resumed(tmp_path: Path) -> None:
    def run(name: str, **options: Any) -> list[dict[str, float]]:
        recipe = None if options.get("resume") else "photos_dino_vmf"
        overrides = () if options.get("resume") else TINY
        pretrain.main(Options(recipe, tmp_path / name, overrides=overrides, log_every=2, **options))
        return read_rows(tmp_path / name / METRICS)

    plain = run("plain", max_steps=4)
    watched = run("watched", max_steps=4, watch=1)
    looks = [row["step"] for row in watched if set(row) >= MEASURES]
    assert looks == [1, 4]
    losses = {row["step"]: row["loss"] for row in watched}
    assert sorted(losses) == [1, 2, 4]  # a look is written when no row was due
    assert all(losses[row["step"]] == row["loss"] for row in plain)
    a, b = (torch.load(tmp_path / name / "checkpoint.pt")["method"] for name in ("plain", "watched"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not (tmp_path / "plain" / "curves.html").exists()
    page = (tmp_path / "watched" / "curves.html").read_text()
    assert "<p>step 4." in page
    assert "refresh" not in page  # the run has ended

    resumed = run("watched", max_steps=6, watch=1, resume=True)
    assert [row["step"] for row in resumed if "rankme" in row] == [1, 4, 6]
    assert "<p>step 6." in (tmp_path / "watched" / "curves.html").read_text()
    said = "\n".join(summary(tmp_path / "watched"))
    assert f"curves: {tmp_path / 'watched' / 'curves.html'}" in said
    assert "kNN on some validation images: " in said


@pytest.mark.parametrize("name", ["dino", "ibot", "msn"])
def test_a_look_touches_no_generator_and_no_training_mode(name: str, tmp_path: Path) -> None:
    recipe, method = tiny_method(name)
    watcher = Watcher(pictures(20), recipe, folder_without_val(tmp_path), every=2)
    method.train()
    before = (torch.get_rng_state(), random.getstate(), str(np.random.get_state()))
    found = watcher.look(method)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), str(np.random.get_state())) == before[1:]
    assert all(module.training for module in method.modules())
    assert set(found) == MEASURES - {"knn_top1", "linear_top1"}  # there are no validation images
    assert watcher.look(method) == found
    with torch.no_grad():
        method.teacher.backbone.layernorm.weight.zero_()
    assert watcher.look(method)["feature_std"] == pytest.approx(0, abs=1e-6)  # the copy follows the teacher


def test_looks_are_due_at_the_first_and_last_step_and_every_so_many_epochs(tmp_path: Path) -> None:
    recipe, _ = tiny_method()
    watcher = Watcher(pictures(20), recipe, folder_without_val(tmp_path), every=2)
    assert [step for step in range(1, 24) if watcher.due(step, 5, 23)] == [1, 10, 20, 23]


def test_a_stream_is_refused() -> None:
    recipe, _ = tiny_method()
    stream = ImageStream.__new__(ImageStream)
    with pytest.raises(ValueError, match=r"`watch` \(=3\) must be 0 with `dataset` 'stream'"):
        Watcher(stream, recipe, None, every=3)
    with pytest.raises(ValueError, match=r"`watch` \(=-1\) must be at least 0"):
        Options("photos_dino_vmf", Path("x"), watch=-1).check()


def test_the_sample_is_fixed_and_without_what_cannot_be_read(tmp_path: Path) -> None:
    recipe, _ = tiny_method()
    images = pictures(8000)
    sample = draw_sample(images, recipe, folder_without_val(tmp_path))
    assert (len(sample.bank), len(sample.viewed), sample.val) == (500, 125, None)
    assert sample.bank.labels.tolist() == draw_sample(images, recipe, tmp_path).bank.labels.tolist()
    assert [label for _, label in sample.bank] == sample.bank.labels.tolist()
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"")
    few = Images("folder", "train", ["a", "b"], np.array([0, 1, 1]), [images.items[0], broken, images.items[1]])
    found = features(choose(few, 3, 0), lambda batch: batch.mean((2, 3)), recipe)
    assert (len(found.x), found.labels.tolist()) == (2, [0, 1])


def test_the_page_draws_what_the_rows_have_without_scripts_or_network(tmp_path: Path) -> None:
    row = '{"step": %d, "loss": 3.5, "kappa_p05": 8, "kappa_p50": 10, "kappa_p95": 12%s}\n'
    look = ', "knn_top1": 0.5, "rankme": 12.5, "alpha_req": 1.1, "feature_std": 0.9'
    lines = [row % (step, look if step in (1, 3) else "") for step in (1, 2, 3)]
    (tmp_path / METRICS).write_text("".join(lines) + '{"step": 4, "lo')
    curves = read_curves(tmp_path / METRICS)
    assert curves["knn_top1"].steps.tolist() == [1, 3]
    assert curves["knn_top1"].values.tolist() == [50, 50]
    assert not len(curves["lidar"].steps)
    write_curves(tmp_path, "a <run>", refresh=True)
    page = (tmp_path / "curves.html").read_text()
    assert "<title>a &lt;run&gt;</title>" in page
    assert '<meta http-equiv="refresh" content="60">' in page
    assert "<td>12.5</td><td>12.5</td>" in page
    assert "<script" not in page
    assert not re.findall(r"(?:src|href)=['\"]https?:", page)
    svg = ElementTree.fromstring(page[page.index("<svg ") : page.index("</svg>") + 6])
    panels = [group for group in svg.iter() if re.fullmatch(r"axes_\d+", group.get("id", ""))]
    assert len(panels) == len(PANELS) - 1  # without that of the prototypes used
    drawn = ElementTree.parse(tmp_path / "curves.svg").getroot()
    assert [element.get("id") for element in drawn.iter()] == [element.get("id") for element in svg.iter()]


def test_a_long_curve_is_thinned_to_means() -> None:
    steps = np.arange(1, 1001.0)
    found = thinned(Curve(steps, 2 * steps), 10)
    assert found.steps.tolist() == [50.5 + 100 * part for part in range(10)]
    assert found.values.tolist() == [2 * step for step in found.steps]
    assert thinned(Curve(steps, steps), 1000).steps is steps
