"""seeds.py: what it still has to run, and the numbers it prints."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

import seeds
from data.images import load_images
from lanes_here import run_lanes_here


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
    right = {"photos_dino": 0.6, "photos_dino_vmf": 0.75, "photos_msn_vmf": 0.7}
    for index, seed in enumerate((3, 4)):
        for recipe in right:
            directory = seeds.run_directory(tmp_path, recipe, seed)
            write_run(directory, "teacher", right[recipe], np.arange(n) < right[recipe] * n + index)
        write_run(seeds.run_directory(tmp_path, "photos_dino_vmf", seed), "random", 0.5, np.arange(n) < 0.5 * n)
    text = seeds.report(tmp_path, seeds.labelled(("photos_dino_vmf", "photos_dino", "photos_msn_vmf")), (3, 4))
    assert "| randomly initialised network | 50.0 50.0 | 50.0 50.0 | 50.0 50.0 | 50.0 50.0 | – – | – – |" in text
    assert "| DINO-vMF | 75.0 75.0 | 75.0 75.0 | 75.0 75.0 | 75.0 75.0 | 7 7 | 9 9 |" in text
    compared = [line.split(":")[0] for line in text.splitlines() if line.startswith("kNN")]
    assert compared == [
        f"kNN, {model} minus randomly initialised network" for model in ("DINO-vMF", "DINO", "MSN-vMF")
    ] + [
        "kNN, DINO-vMF minus DINO"  # plain MSN is not among them
    ]
    assert "DINO-vMF minus randomly initialised network: +25" in text


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


def titles(output, models, label):
    return [job.title.removeprefix(f"{label}, seed 1: ") for job in seeds.jobs(output, models, label, 1, None, None)]


def test_finished_parts_are_not_run_again(tmp_path):
    models = seeds.labelled(("photos_ibot", "photos_dino"))
    assert titles(tmp_path, models, "iBOT") == ["pretraining", "evaluating random", "evaluating teacher"]
    assert titles(tmp_path, models, "DINO") == ["pretraining", "evaluating teacher"]  # the same untrained network
    directory = seeds.run_directory(tmp_path, "photos_ibot", 1)
    (directory / "backbone").mkdir(parents=True)
    write_run(directory, "random", 0.5, True)
    assert titles(tmp_path, models, "iBOT") == ["evaluating teacher"]


def test_recipes_for_a_folder_get_its_name(tmp_path):
    models = seeds.labelled(("small28_dino_vmf_quick", "small28_dino_quick"), tmp_path)
    assert list(models) == ["DINO-vMF", "DINO"]
    pretraining, *evaluating = seeds.jobs(tmp_path / "out", models, "DINO", 1, tmp_path, None)
    assert pretraining.command[-2:] == ["--data", str(tmp_path)]
    assert not any("--data" in job.command for job in evaluating)  # a run knows where its images are
    with pytest.raises(
        ValueError, match=r"`data` \(=None\) must be a folder of images for recipes with `dataset` folder"
    ):
        seeds.labelled(("small28_dino_quick",))
    with pytest.raises(ValueError, match=r"`data` \(=/images\) must be .* with `dataset` folder, and for no others"):
        seeds.labelled(("photos_dino",), Path("/images"))


def test_recipes_share_the_lanes_and_the_default_is_one_each(tmp_path, monkeypatch):
    ran = {}
    monkeypatch.setattr(seeds, "run_lanes", ran.update)
    monkeypatch.setattr(seeds, "report", lambda *_: "")
    seeds.main(tmp_path)
    first, second = ([job.title for job in jobs if "pretraining" in job.title] for jobs in ran.values())
    assert first == [f"DINO, seed {seed}: pretraining" for seed in (0, 1, 2)]
    assert second == [f"DINO-vMF, seed {seed}: pretraining" for seed in (0, 1, 2)]
    seeds.main(tmp_path, ("photos_msn", "photos_ibot", "photos_dino"), (0, 1), parallel=4)
    counts = [sum("pretraining" in job.title for job in jobs) for jobs in ran.values()]
    assert counts == [2, 2, 1, 1]


@pytest.mark.parametrize(
    ("recipes", "message"),
    [
        ((), r"`recipes` \(=\(\)\) must be different ones, at least one"),
        (("photos_msn", "photos_msn"), r"`recipes` \(=\('photos_msn', 'photos_msn'\)\) must be different ones"),
        (("photos_dino", "digits_dino_vmf"), r"must have the same `dataset`, .*: photos_dino photos, digits_dino_vmf"),
        (("imagenet_vits16_dino_vmf",), r"`data` \(=None\) must be a folder of images"),
    ],
)
def test_recipes_that_cannot_be_compared(tmp_path, recipes, message):
    with pytest.raises(ValueError, match=message):
        seeds.main(tmp_path, recipes)


def test_recipes_of_one_method_keep_their_names():
    assert list(seeds.labelled(("photos_msn", "photos_msn_vmf"))) == ["MSN", "MSN-vMF"]
    assert list(seeds.labelled(("digits_dino_vmf",))) == ["DINO-vMF"]


@pytest.mark.parametrize("wrong", [(), (1,), (1, 1)])
def test_one_seed_has_no_spread(tmp_path, wrong):
    with pytest.raises(ValueError, match=r"`seeds` \(=.*\) must be at least two different numbers"):
        seeds.main(tmp_path, seeds=wrong)


@pytest.mark.slow
def test_the_whole_path(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(seeds, "run_lanes", run_lanes_here)
    monkeypatch.setattr(sys, "argv", ["seeds.py"])
    seeds.main(tmp_path / "runs", recipes=("photos_msn_vmf",), seeds=(0, 1), max_steps=2)
    out = capfd.readouterr().out
    assert "| MSN-vMF |" in out
    assert out.count("paired standard error") == 1
