"""Measures of features against the formulas of their papers; runs that are watched: the same losses, more numbers."""

import math
import random
import re
import tempfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import RidgeClassifierCV
from sklearn.preprocessing import StandardScaler

import pretrain
from config.recipe import load_recipe
from data.images import Images
from data.stream import ImageStream
from evaluators.protocol import Features
from gloo import run_on_ranks
from methods.registry import build_method
from pretrain import Options
from storage.json_lines import read_rows
from tiny_run import TINY_RUN
from training.log import METRICS, summary
from training.parallel import parallelize
from watching.curves import PANELS, Curve, read_curves, thinned, write_curves
from watching.measures import STRENGTHS, alpha_req, feature_std, lidar, rankme, ridge_top1
from watching.sample import choose, draw_sample, features
from watching.watcher import Watcher

MEASURES = {"knn_top1", "linear_top1", "rankme", "lidar", "alpha_req", "feature_std", "watch_seconds"}
TINY = (*TINY_RUN, "epochs=1", "freeze_last_layer_epochs=0", "drop_path=0.2")


def random_features(*shape: int) -> np.ndarray:
    x = np.random.default_rng(0).standard_normal(shape)
    return (x * np.arange(1, shape[-1] + 1) ** -0.7 + 0.3).astype(np.float32)


# ---------------------------------------------------------------------------------------------------- Measures


def test_rankme_is_the_formula_of_its_paper() -> None:
    x = random_features(30, 12)
    sigma = [math.sqrt(value) for value in np.linalg.eigvalsh(x.astype(float).T @ x.astype(float))]
    p = [value / sum(sigma) + 1e-7 for value in sigma]
    assert rankme(x) == pytest.approx(math.exp(-sum(share * math.log(share) for share in p)), rel=1e-9)
    assert rankme(np.outer(np.ones(9), np.arange(1.0, 6))) == pytest.approx(1, abs=1e-4)
    assert math.isnan(rankme(np.zeros((4, 3))))


def test_lidar_is_the_formula_of_its_paper() -> None:
    n, q, d = 7, 3, 4
    x = random_features(n, q, d)
    mean_of, mean = x.mean(axis=1, dtype=float), x.mean(axis=(0, 1), dtype=float)
    sb, sw = np.zeros((d, d)), 1e-4 * np.eye(d)
    for i in range(n):
        sb += np.outer(mean_of[i] - mean, mean_of[i] - mean) / n
        for k in range(q):
            sw += np.outer(x[i, k] - mean_of[i], x[i, k] - mean_of[i]) / (n * q)
    values = np.linalg.eigvals(np.linalg.inv(sw) @ sb).real  # those of Sw^-1/2 Sb Sw^-1/2
    p = values / values.sum() + 1e-7
    assert lidar(x) == pytest.approx(math.exp(-np.sum(p * np.log(p))), rel=1e-6)
    assert math.isnan(lidar(np.ones((3, 2, 4))))
    with pytest.raises(ValueError, match=r"`x` \(of shape \(3, 1, 4\)\) must be \(n, q, D\) with n and q at least 2"):
        lidar(x[:3, :1])


def test_alpha_req_finds_the_exponent_of_a_spectrum() -> None:
    rows, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((50, 21)) - 1)
    rows, _ = np.linalg.qr(rows - rows.mean(axis=0))
    spectrum = np.arange(1, 21) ** -1.3
    x = rows[:, :20] * np.sqrt(spectrum)
    assert alpha_req(x + 5) == pytest.approx(1.3, abs=1e-6)  # the covariance does not see the mean
    spectrum[[2, 11]] *= 3.0  # no power law: the weighted fit itself, by its normal equations
    j, y = np.arange(1, 21), np.log(spectrum[np.argsort(-spectrum)])
    weights = np.diag(1 / j)
    design = np.stack([-np.log(j), np.ones(20)], axis=1)
    expected = np.linalg.solve(design.T @ weights @ design, design.T @ weights @ y)[0]
    assert alpha_req(rows[:, :20] * np.sqrt(spectrum)) == pytest.approx(expected, abs=1e-6)
    assert math.isnan(alpha_req(np.ones((5, 3))))


def test_a_direction_without_variance_but_rounding_does_not_bend_alpha_req() -> None:
    x = random_features(200, 8)
    normed = torch.nn.functional.layer_norm(torch.from_numpy(x), (8,)).numpy()  # each row sums to zero
    basis = np.linalg.svd(np.ones((1, 8)))[2][1:]
    assert alpha_req(normed) == pytest.approx(alpha_req(normed @ basis.T), abs=1e-4)


def test_feature_std_is_one_for_all_directions_and_zero_for_one() -> None:
    assert feature_std(np.random.default_rng(0).standard_normal((20_000, 8))) == pytest.approx(1, abs=0.02)
    assert feature_std(np.outer(np.arange(1.0, 9), np.ones(5))) == pytest.approx(0, abs=1e-9)


def test_the_ridge_classifier_is_that_of_scikit_learn() -> None:
    labels = np.random.default_rng(1).integers(0, 5, 90)
    x = random_features(90, 12) + 0.6 * np.eye(5, 12)[labels].astype(np.float32)
    bank, queries = (Features(x[rows], labels[rows], list("abcde")) for rows in (slice(0, 50), slice(50, 90)))
    scaler = StandardScaler().fit(bank.x)
    theirs = RidgeClassifierCV(alphas=STRENGTHS).fit(scaler.transform(bank.x), bank.labels)
    expected = np.mean(theirs.predict(scaler.transform(queries.x)) == queries.labels)
    assert 0.3 < expected < 0.95
    assert ridge_top1(bank, queries) == pytest.approx(expected)
    assert math.isnan(ridge_top1(bank._replace(labels=np.zeros(50, int)), queries))


# ------------------------------------------------------------------------------------------------ Watched runs


@pytest.fixture
def one_thread() -> Any:
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


def tiny_method() -> tuple[Any, Any, Images]:
    recipe = load_recipe("photos_dino_vmf", SETTINGS)
    return recipe, build_method(recipe), pictures(20)


SETTINGS = {
    "dataset": "folder", "batch_size": 4, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1,
    "out_dim": 8, "hidden_dim": 8, "bottleneck_dim": 4, "image_size": 16, "local_size": 8,
}  # fmt: skip


def pictures(count: int) -> Images:
    rng = np.random.default_rng(0)
    items = [Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(count)]
    return Images("folder", "train", ["a", "b"], np.arange(count) % 2, items)


def test_a_look_touches_no_generator_and_no_training_mode(tmp_path: Path) -> None:
    recipe, method, images = tiny_method()
    watcher = Watcher(images, recipe, folder_without_val(tmp_path), every=2)
    method.train()
    before = (torch.get_rng_state(), random.getstate(), str(np.random.get_state()))
    found = watcher.look(method)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), str(np.random.get_state())) == before[1:]
    assert all(module.training for module in method.modules())
    assert set(found) == MEASURES - {"knn_top1", "linear_top1"}  # there are no validation images
    again = watcher.look(method)
    assert all(found[name] == again[name] for name in set(found) - {"watch_seconds"})
    with torch.no_grad():
        method.teacher.backbone.layernorm.weight.zero_()
    assert watcher.look(method)["feature_std"] == pytest.approx(0, abs=1e-6)  # the copy follows the teacher


def folder_without_val(path: Path) -> Path:
    (path / "train" / "a").mkdir(parents=True, exist_ok=True)
    return path


def looks_on_this_rank(rank: int) -> Any:
    torch.manual_seed(0)
    recipe, method, images = tiny_method()
    method.teacher.backbone.layernorm.weight.data += 0.1  # other weights than those that the watcher draws
    parallelize(method, strategy="fsdp2")
    with tempfile.TemporaryDirectory() as folder:
        watcher = Watcher(images, recipe, folder_without_val(Path(folder)), every=1)
    found = watcher.look(method)
    found.pop("watch_seconds", None)
    return found


def test_ranks_that_share_the_weights_out_see_what_one_process_sees(tmp_path: Path) -> None:
    main, other = run_on_ranks(looks_on_this_rank)
    assert other == {}
    recipe, method, images = tiny_method()
    method.teacher.backbone.layernorm.weight.data += 0.1
    alone = Watcher(images, recipe, folder_without_val(tmp_path), every=1).look(method)
    alone.pop("watch_seconds")
    assert main == pytest.approx(alone, rel=1e-4)


def test_looks_are_due_at_the_first_and_last_step_and_every_so_many_epochs(tmp_path: Path) -> None:
    recipe, _, images = tiny_method()
    watcher = Watcher(images, recipe, folder_without_val(tmp_path), every=2)
    assert [step for step in range(1, 24) if watcher.due(step, 5, 23)] == [1, 10, 20, 23]


def test_a_stream_is_refused() -> None:
    recipe, _, _ = tiny_method()
    stream = ImageStream.__new__(ImageStream)
    with pytest.raises(ValueError, match=r"`watch` \(=3\) must be 0 with `dataset` 'stream'"):
        Watcher(stream, recipe, None, every=3)
    with pytest.raises(ValueError, match=r"`watch` \(=-1\) must be at least 0"):
        Options("photos_dino_vmf", Path("x"), watch=-1).check()


def test_the_sample_is_fixed_and_without_what_cannot_be_read(tmp_path: Path) -> None:
    recipe, _, _ = tiny_method()
    images = pictures(900)
    sample = draw_sample(images, recipe, folder_without_val(tmp_path))
    assert (len(sample.bank), len(sample.viewed), sample.val) == (225, 56, None)
    assert sample.bank.labels.tolist() == draw_sample(images, recipe, tmp_path).bank.labels.tolist()
    assert [label for _, label in sample.bank] == sample.bank.labels.tolist()
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"")
    few = Images("folder", "train", ["a", "b"], np.array([0, 1, 1]), [images.items[0], broken, images.items[1]])
    found = features(choose(few, 3, 0), lambda batch: batch.mean((2, 3)), recipe)
    assert (len(found.x), found.labels.tolist()) == (2, [0, 1])


# ---------------------------------------------------------------------------------------------------- The page


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


def test_a_long_curve_is_thinned_to_means() -> None:
    steps = np.arange(1, 1001.0)
    found = thinned(Curve(steps, 2 * steps), 10)
    assert found.steps.tolist() == [50.5 + 100 * part for part in range(10)]
    assert found.values.tolist() == [2 * step for step in found.steps]
    assert thinned(Curve(steps, steps), 1000).steps is steps
