"""The demo's table and sentences: from numbers made here to the words that are printed."""

import json
import math

import numpy as np
import pytest

from reporting.demo_table import MODELS, RUNS, compare_knn, format_table, make_table, paired_difference, sentence


def write_run(directory, features, accuracy, *, used=None):
    directory.mkdir(parents=True, exist_ok=True)
    common = {"features": features, "split": "test", "n": 400, "seconds": 1.0}
    rows = [
        {"protocol": "knn", "metric": "top1", "value": accuracy, **common},
        {"protocol": "linear", "metric": "top1", "value": accuracy, **common},
        {"protocol": "fewshot", "metric": "1-shot", "value": accuracy / 2, "sd": 0.031, **common},
        {"protocol": "fewshot", "metric": "5-shot", "value": accuracy / 2, "sd": 0.02, **common},
    ]
    if used:
        train = {**common, "split": "train", "n": 1000, "protocol": "prototypes"}
        names = ("prototypes", "used_logits", "used_targets", "kappa_p05", "kappa_p95")
        rows += [{**train, "metric": name, "value": value} for name, value in zip(names, used, strict=True)]
        steps = [{"step": step, "seconds": 10.0 * step} for step in (1, 2, 3)]
        (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps))
    with (directory / "results.jsonl").open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def output(tmp_path):
    write_run(tmp_path / "photos_dino", "teacher", 0.75, used=(128, 20, 60, 9.0, 11.5))
    write_run(tmp_path / "photos_dino", "random", 0.6)
    write_run(tmp_path / "photos_dino_vmf", "teacher", 0.8, used=(128, 70, 90, 8.25, 14.0))
    write_run(tmp_path / "photos_dino_vmf", "pixels", 0.4)
    return tmp_path


def test_the_table_takes_every_number_from_its_own_run(output):
    table = {row["model"]: row for row in make_table(output)}
    assert list(table) == list(MODELS)
    assert [table[model]["kNN"] for model in MODELS] == [0.4, 0.6, 0.75, 0.8]
    assert table["DINO"]["kNN ±"] == pytest.approx(math.sqrt(0.75 * 0.25 / 400))
    assert table["DINO"]["1-shot ±"] == 0.031
    assert (table["DINO"]["used by logits"], table["DINO-vMF"]["used by targets"]) == (20, 90)
    assert table["DINO-vMF"]["κ 5–95 %"] == [8.25, 14.0]
    assert table["DINO-vMF"]["seconds"] == 30.0
    assert table["raw pixels"]["used by logits"] is None


def test_a_repeated_evaluation_replaces_the_first(output):
    write_run(output / "photos_dino", "random", 0.65)
    assert make_table(output)[1]["kNN"] == 0.65


def test_validation_rows_are_not_reported(output):
    path = output / "photos_dino" / "results.jsonl"
    row = {"protocol": "knn", "metric": "top1", "features": "random", "split": "val", "value": 0.99, "n": 5}
    path.write_text(path.read_text() + json.dumps(row) + "\n")
    assert make_table(output)[1]["kNN"] == 0.6


def test_the_text_table_is_aligned(output):
    lines = format_table(make_table(output)).splitlines()
    assert len(lines) == 5
    assert len({len(line) for line in lines}) == 1
    assert lines[3].split() == "DINO 20/128 60/128 9.0–11.5 75.0 ± 2.2 37.5 ± 3.1 37.5 ± 2.0 75.0 ± 2.2 30".split()
    assert lines[1].split()[:6] == ["raw", "pixels", "–", "–", "–", "40.0"]


def test_paired_difference_is_that_of_a_loop():
    a, b = np.random.default_rng(0).random((2, 200)) < 0.7
    differences = [int(x) - int(y) for x, y in zip(a, b, strict=True)]
    mean = sum(differences) / 200
    variance = sum((d - mean) ** 2 for d in differences) / 199
    assert paired_difference(a, b) == pytest.approx((mean, math.sqrt(variance / 200)))


def test_compare_knn_reads_each_models_predictions(output):
    labels = np.arange(100) % 5
    right = {"raw pixels": 20, "randomly initialised ViT": 60, "DINO": 80, "DINO-vMF": 90}
    for model, (run, features) in MODELS.items():
        folder = output / run / "predictions"
        folder.mkdir(exist_ok=True)
        predicted = np.where(np.arange(100) < right[model], labels, labels + 1)
        np.save(folder / f"knn-{features}-test.npy", predicted)
    found = {(row["a"], row["b"]): row["difference"] for row in compare_knn(output, labels)}
    assert found.keys() == {(run, other) for run in RUNS for other in MODELS if other not in RUNS} | {
        ("DINO-vMF", "DINO")
    }
    assert found["DINO-vMF", "randomly initialised ViT"] == pytest.approx(0.3)
    assert found["DINO", "raw pixels"] == pytest.approx(0.6)
    assert found["DINO-vMF", "DINO"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("a", "b", "difference", "error", "expected"),
    [
        ("DINO", "raw pixels", 0.30, 0.02, "DINO is above raw pixels: +30.0 ± 2.0 points, 15.0 standard errors."),
        ("DINO", "raw pixels", -0.30, 0.02, "DINO is below raw pixels: −30.0 ± 2.0 points, 15.0 standard errors."),
        ("DINO", "raw pixels", 0.05, 0.02, "DINO and raw pixels cannot be told apart: +5.0 ± 2.0 points"),
        ("DINO-vMF", "DINO", 0.01, 0.02, "DINO-vMF and DINO cannot be told apart"),
        ("DINO-vMF", "DINO", -0.10, 0.02, "DINO-vMF came out below DINO in this run: −10.0 ± 2.0 points"),
        ("DINO-vMF", "DINO", 0.0, 0.0, "DINO-vMF and DINO are right on the same test images."),
    ],
)
def test_sentences_say_what_the_numbers_allow(a, b, difference, error, expected):
    said = sentence({"a": a, "b": b, "difference": difference, "standard_error": error, "n": 400})
    assert said.startswith(expected)


def test_a_difference_between_two_runs_never_ranks_the_methods():
    said = sentence({"a": "DINO-vMF", "b": "DINO", "difference": 0.2, "standard_error": 0.02, "n": 400})
    assert said.endswith("so it ranks these two runs, not the methods.")
