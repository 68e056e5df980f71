"""The demo: what it claims, what is left to do, and the whole of it in a few steps."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import demo
from config.recipe import load_recipe
from lanes_here import run_lanes_here
from reporting.demo_table import MODELS, RUNS

ACCURATE = ("knn", "fewshot", "linear")
DEMO = Path(__file__).parents[2] / "examples" / "vit_ssl" / "demo.py"


@pytest.fixture
def recipes():
    return {run: load_recipe(run) for run in RUNS.values()}


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_two_recipes_differ_in_the_method_and_in_what_was_chosen_for_it(recipes):
    plain, vmf = (dataclasses.asdict(recipe) for recipe in recipes.values())
    differing = {name for name in plain if plain[name] != vmf[name]}
    assert differing == {"name", "normalization", "centering", "bottleneck_dim", "norms_lr_multiplier"}
    assert plain["norms_lr_multiplier"] == 0, "plain DINO's norms learn as DINO's do"


def test_a_new_directory_is_claimed_and_can_be_claimed_again(tmp_path, recipes):
    demo.claim(tmp_path / "new" / "demo", recipes, 5)
    before = contents(tmp_path)
    demo.claim(tmp_path / "new" / "demo", recipes, 5)
    assert before
    assert contents(tmp_path) == before


def test_a_directory_of_something_else_is_refused(tmp_path, recipes):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(FileExistsError, match=r"`output` \(='.*'\) is not empty and holds no demo"):
        demo.claim(tmp_path, recipes, None)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_demo_of_another_length_or_recipe_is_refused(tmp_path, recipes):
    demo.claim(tmp_path, recipes, 5)
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match="holds a demo of --max-steps 5"):
        demo.claim(tmp_path, recipes, None)
    changed = {run: dataclasses.replace(recipe, epochs=recipe.epochs + 1) for run, recipe in recipes.items()}
    with pytest.raises(FileExistsError, match="holds a demo of other recipes"):
        demo.claim(tmp_path, changed, 5)
    assert contents(tmp_path) == before


def test_max_steps_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match=r"`max_steps` \(=0\) must be at least 1"):
        demo.main(tmp_path / "demo", max_steps=0)
    assert not (tmp_path / "demo").exists()


def test_only_a_finished_demo_has_a_report_to_draw_again(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"`output` .* must be the directory of a finished demo"):
        demo.main(tmp_path / "demo", redraw=True)
    assert not (tmp_path / "demo").exists()


def test_what_is_left_to_do(tmp_path, recipes):
    def titles():
        return [job.title for job in demo.jobs(tmp_path, "photos_dino", recipes["photos_dino"], 7)]

    todo = demo.jobs(tmp_path, "photos_dino", recipes["photos_dino"], 7)
    assert [job.title for job in todo] == ["pretraining", "evaluating random", "evaluating teacher"]
    assert todo[0].steps == 7
    assert "--resume" not in todo[0].command
    assert all(job.command[-2:] == ["--split", "test"] for job in todo[1:])

    directory = tmp_path / "photos_dino"
    directory.mkdir()
    (directory / "checkpoint.pt").touch()
    assert demo.jobs(tmp_path, "photos_dino", recipes["photos_dino"], 7)[0].command[-1] == "--resume"

    (directory / "backbone").mkdir()
    assert titles() == ["evaluating random", "evaluating teacher"]

    done = [{"features": name, "protocol": protocol} for name in ("random", "teacher") for protocol in ACCURATE]
    (directory / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in done))
    assert titles() == ["evaluating teacher"]  # its prototypes are missing
    for missing in done:
        rows = [*(row for row in done if row != missing), {"features": "teacher", "protocol": "prototypes"}]
        (directory / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
        assert titles() == [f"evaluating {missing['features']}"]
    done.insert(0, {"features": "teacher", "protocol": "prototypes"})  # the order of rows means nothing
    (directory / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in done))
    assert titles() == []


def run_demo(output, **kwargs):
    command = [sys.executable, str(DEMO), "--output", str(output), "--max-steps", "4"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)


@pytest.mark.slow
def test_interrupted_continued_finished_and_left_alone(tmp_path, monkeypatch, capsys):
    output = tmp_path / "demo"
    process = run_demo(output)
    deadline = time.monotonic() + 300
    while not any(output.glob("*/metrics.jsonl")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM
    assert "The same command continues it" in stderr
    assert not (output / "results.json").exists()

    monkeypatch.setattr(demo, "run_lanes", run_lanes_here)  # `.ci/run` runs a demo with all its processes
    demo.main(output, max_steps=4)
    stdout = capsys.readouterr().out
    for model in MODELS:
        assert re.search(rf"^{re.escape(model)} .*\d\d\.\d ± \d", stdout, re.MULTILINE)
    results = json.loads((output / "results.json").read_text())
    assert results["steps"] == {"photos_dino": 4, "photos_dino_vmf": 4}
    assert results["recipes"]["photos_dino_vmf"]["seed"] == load_recipe("photos_dino_vmf").seed
    page = (output / "report.html").read_text(encoding="utf-8")
    assert "This is a shortened run, 4 of" in page
    for row in results["table"]:
        assert f"{100 * row['kNN']:.1f} ±" in page

    before = contents(output)
    demo.main(output, max_steps=4)
    assert "holds a finished demo" in capsys.readouterr().out
    assert contents(output) == before

    (output / "report.html").unlink()
    demo.main(output, redraw=True)
    assert "This is a shortened run, 4 of" in (output / "report.html").read_text(encoding="utf-8")
