"""seeds.py: what it still has to run, and the numbers it prints."""

import json
import math
import sys

import numpy as np
import pytest

import seeds
from data import load_images


def write_run(directory, features, accuracy, correct):
    (directory / "predictions").mkdir(parents=True, exist_ok=True)
    labels = load_images("photos", "test").labels
    np.save(directory / "predictions" / f"knn-{features}-test.npy", np.where(correct, labels, -1))
    rows = [("knn", "top1"), ("linear", "top1"), ("fewshot", "1-shot"), ("fewshot", "5-shot")]
    rows = [{"protocol": p, "metric": m, "value": accuracy, "features": features, "split": "test"} for p, m in rows]
    if features == "teacher":
        used = {"protocol": "prototypes", "features": features, "split": "train"}
        rows += [used | {"metric": "used_scores", "value": 7}, used | {"metric": "used_targets", "value": 9}]
    with (directory / "results.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def test_the_report_shows_every_seed_and_paired_differences(tmp_path):
    n = len(load_images("photos", "test").labels)
    right = {"random": 0.5, "photos_dino": 0.6, "photos_dino_vmf": 0.75}
    for index, seed in enumerate((3, 4)):
        for recipe in ("photos_dino", "photos_dino_vmf"):
            directory = seeds.run_directory(tmp_path, recipe, seed)
            write_run(directory, "teacher", right[recipe], np.arange(n) < right[recipe] * n + index)
        write_run(seeds.run_directory(tmp_path, "photos_dino_vmf", seed), "random", 0.5, np.arange(n) < 0.5 * n)
    text = seeds.report(tmp_path, (3, 4))
    assert "| randomly initialised ViT | 50.0 50.0 | 50.0 50.0 | 50.0 50.0 | 50.0 50.0 | – – | – – |" in text
    assert "| DINO-vMF | 75.0 75.0 | 75.0 75.0 | 75.0 75.0 | 75.0 75.0 | 7 7 | 9 9 |" in text
    assert "DINO-vMF minus randomly initialised ViT: +25" in text


def test_the_two_standard_errors():
    a = np.array([[1, 1, 1, 0], [1, 1, 1, 1]], dtype=bool)
    b = np.array([[1, 0, 0, 0], [1, 0, 1, 0]], dtype=bool)
    per_image = np.array([0, 1, 0.5, 0.5])
    over_images = 100 * per_image.std(ddof=1) / math.sqrt(4)
    line = seeds.compare("A", "B", a, b)  # by seed: 2/4 and 2/4
    assert line == (
        "kNN, A minus B: +50.0 points (+50.0, +50.0); paired standard error "
        f"{over_images:.1f} over test images, 0.0 over seeds."
    )


def test_finished_parts_are_not_run_again(tmp_path):
    titles = [job.title for job in seeds.jobs(tmp_path, "photos_dino_vmf", (0, 1), None)]
    assert titles == [
        f"{what}, seed {seed}" for seed in (0, 1) for what in ("pretraining", "evaluating random", "evaluating teacher")
    ]
    directory = seeds.run_directory(tmp_path, "photos_dino_vmf", 0)
    (directory / "backbone").mkdir(parents=True)
    write_run(directory, "random", 0.5, True)
    titles = [job.title for job in seeds.jobs(tmp_path, "photos_dino_vmf", (0,), None)]
    assert titles == ["evaluating teacher, seed 0"]


@pytest.mark.parametrize("wrong", [(), (1,), (1, 1)])
def test_one_seed_has_no_spread(tmp_path, wrong):
    with pytest.raises(ValueError, match=r"`seeds` \(=.*\) must be at least two different numbers"):
        seeds.main(tmp_path, wrong)


@pytest.mark.slow
def test_the_whole_path(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["seeds.py"])
    seeds.main(tmp_path / "runs", (0, 1), max_steps=2)
    out = capfd.readouterr().out
    assert "| DINO-vMF |" in out
    assert out.count("paired standard error") == 3
