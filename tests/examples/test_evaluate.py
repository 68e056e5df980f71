"""evaluate.py on a saved run: what it feeds the protocols, what it writes, what it refuses."""

import json

import numpy as np
import pytest
import torch
import tyro
from PIL import Image

import evaluate
from augment import EvalTransform
from backbone import cls_token
from checkpoint import load_run, random_backbone, save_checkpoint
from config import load_recipe
from data import load_images
from methods.dino import DINO

TINY = {
    **{"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "local_size": 8},
    **{"patch_size": 8, "out_dim": 12, "hidden_dim": 16, "bottleneck_dim": 8, "num_workers": 0},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The directory of a run whose teacher is not its first weights."""
    directory = tmp_path_factory.mktemp("run")
    recipe = load_recipe("photos_dino_vmf", TINY)
    method = DINO(recipe)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in method.teacher.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    save_checkpoint(directory, {"recipe": recipe, "method": method.state_dict(), "step": 5, "epoch": recipe.epochs})
    return directory


@pytest.fixture
def run_directory(trained, tmp_path):
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "checkpoint.pt").symlink_to(trained / "checkpoint.pt")
    return directory


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in [("train", 13), ("val", 6), ("test", 7)]:
        for number, name in enumerate(["dark", "light", "red"]):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 120, (20, 24, 3)) + [[0, 0, 0], [3, 3, 3], [9, 0, 0]][number]
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{index}.png")
    return root  # hard to tell apart, so that accuracies are neither 0 nor 1


def written(directory):
    return [json.loads(line) for line in (directory / "results.jsonl").read_text().splitlines()]


def test_all_protocols_are_appended_and_printed(run_directory, folder, capsys):
    rows = evaluate.evaluate("all", run_directory, split="test", data=folder)
    assert written(run_directory) == rows
    metrics = [(row["protocol"], row["metric"]) for row in rows]
    assert metrics[:4] == [("knn", "top1"), ("linear", "top1"), ("fewshot", "1-shot"), ("fewshot", "5-shot")]
    prototype_metrics = [metric for protocol, metric in metrics[4:] if protocol == "prototypes"]
    kappas = ["kappa_min", "kappa_p05", "kappa_p50", "kappa_p95", "kappa_max"]
    assert prototype_metrics == ["prototypes", "used_scores", "used_targets", *kappas, "unique"]
    for row in rows:
        trained_on = row["protocol"] == "prototypes"
        assert (row["features"], row["split"], row["n"]) == (
            "teacher",
            *(("train", 39) if trained_on else ("test", 21)),
        )
        assert row["seconds"] >= 0
        assert row["date"].endswith("+00:00")
        assert trained_on or 0 <= row["value"] <= 1
    assert rows[0]["k"] in (5, 10, 20, 50)
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 1 + len(rows)
    assert table[0].split() == ["protocol", "features", "split", "metric", "value"]
    assert table[1].split()[:5] == ["knn", "teacher", "test", "top1", f"{rows[0]['value']:.3f}"]
    assert written(run_directory) + evaluate.evaluate("knn", run_directory, data=folder) == written(run_directory)


def test_predictions_are_kept_for_paired_comparisons(run_directory, folder):
    labels = load_images("folder", "test", data=folder).labels
    for row in evaluate.evaluate("all", run_directory, features="pixels", split="test", data=folder)[:2]:
        predicted = np.load(run_directory / "predictions" / f"{row['protocol']}-pixels-test.npy")
        assert row["value"] == pytest.approx(np.mean(predicted == labels))


def test_features_are_what_they_are_called(run_directory, folder):
    run = load_run(run_directory)
    images = [image for image, _ in load_images("folder", "val", data=folder)]
    batch = torch.stack([EvalTransform(16, keep=224 / 256)(image) for image in images])
    with torch.no_grad():
        expected = {
            "teacher": cls_token(run.backbone, batch),
            "random": cls_token(random_backbone(run.recipe), batch),
            "pixels": batch.reshape(18, -1),
        }
    for name, x in expected.items():
        features = evaluate.make_features(run, name, folder)("val")
        assert np.allclose(features.x, x.numpy(), atol=1e-5)
        assert features.labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6
        assert features.classes == ["dark", "light", "red"]
    assert not np.allclose(expected["teacher"], expected["random"], atol=1e-2)


def test_the_runs_own_data_is_used_whole(run_directory):
    run = load_run(run_directory)
    features = evaluate.make_features(run, "pixels")("val")
    image = load_images("photos", "val")[7][0]
    assert len(features.labels) == len(load_images("photos", "val"))
    assert np.array_equal(features.x[7], EvalTransform(16)(image).flatten().numpy())


def test_every_split_is_extracted_once(run_directory, folder, monkeypatch):
    loaded = []
    monkeypatch.setattr(
        evaluate, "load_images", lambda name, split, data: loaded.append(split) or load_images(name, split, data=data)
    )
    evaluate.evaluate("all", run_directory, split="test", data=folder)
    assert sorted(loaded) == ["test", "train", "val"]


def test_only_the_teacher_has_prototypes(run_directory, folder):
    rows = evaluate.evaluate("all", run_directory, features="random", data=folder)
    assert {row["protocol"] for row in rows} == {"knn", "linear", "fewshot"}
    with pytest.raises(ValueError, match=r"`features` \(='random'\) must be 'teacher' for the protocol 'prototypes'"):
        evaluate.evaluate("prototypes", run_directory, features="random", data=folder)


def test_bad_input_writes_nothing(run_directory, tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        evaluate.evaluate("knn", tmp_path)
    (tmp_path / "images/cat").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(tmp_path / "images/cat/a.png")
    with pytest.raises(FileNotFoundError, match="there is no 'val' split: expected PATH/"):
        evaluate.evaluate("knn", run_directory, data=tmp_path / "images")
    assert not (run_directory / "results.jsonl").exists()


def test_command_line(run_directory, folder, capsys):
    arguments = [
        "knn",
        "--checkpoint",
        str(run_directory),
        "--features",
        "pixels",
        "--split",
        "test",
        "--data",
        str(folder),
    ]
    tyro.cli(evaluate.evaluate, args=arguments)
    assert [(row["features"], row["split"]) for row in written(run_directory)] == [("pixels", "test")]
    with pytest.raises(SystemExit, match="2"):
        tyro.cli(evaluate.evaluate, args=["segmentation", "--checkpoint", str(run_directory)])
    assert "segmentation" in capsys.readouterr().err
