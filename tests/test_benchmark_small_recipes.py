"""`python -m benchmarks small-recipes` goes on where it stopped, and docs/examples.md shows what it found."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks import results, small_recipes
from PIL import Image

from config.recipe import load_recipe, save_recipe


def test_the_page_shows_the_committed_results() -> None:
    page = small_recipes.DOCS.read_text()
    assert "<!-- table: small_recipes -->" in page
    assert small_recipes.rendered(page) == page, "run `python -m benchmarks small-recipes`"


def test_every_recipe_beats_raw_pixels_in_every_seed() -> None:
    result = results.latest("small_recipes")
    assert "small28_dino_vmf_quick" in {row["recipe"] for row in result["rows"]} <= set(small_recipes.RECIPES)
    for row in result["rows"]:
        for protocol, pixels in result["raw_pixels"].items():
            assert row[protocol] > pixels, row


def test_the_recipes_have_one_network() -> None:
    fields = ("backbone", "image_size", "patch_size", "hidden_size", "num_hidden_layers", "feature_grid")
    recipes = [load_recipe(name) for name in small_recipes.RECIPES]
    assert len({tuple(getattr(recipe, field) for field in fields) for recipe in recipes}) == 1


def test_an_interrupted_table_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    rng = np.random.default_rng(0)
    for split, label in ((split, label) for split in ("train", "val", "test") for label in range(2)):
        (tmp_path / "images" / split / str(label)).mkdir(parents=True)
        for number in range(8):
            pixels = rng.integers(0, 100, (9, 9)) + 120 * label
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "images" / split / str(label) / f"{number}.png")
    tiny = {"hidden_size": 8, "out_dim": 8, "hidden_dim": 8, "bottleneck_dim": 4, "image_size": 8, "local_size": 8}
    tiny |= {"batch_size": 8, "epochs": 2, "warmup_epochs": 0}
    names = []
    for name in ("one", "two"):
        save_recipe(load_recipe("small28_dino_vmf_quick", tiny | {"name": name}), tmp_path / f"{name}.yaml")
        names.append(str(tmp_path / f"{name}.yaml"))
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table: small_recipes -->\n<!-- end -->\nafter\n")
    monkeypatch.setattr(small_recipes, "DOCS", page)
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    for seeds in ((0,), (0, 1)):
        small_recipes.small_recipes(
            tmp_path / "images", recipes=tuple(names), seeds=seeds, split="val", output=tmp_path / "runs"
        )
    rows = json.loads(next((tmp_path / "results").iterdir()).read_text())["rows"]
    assert [(row["recipe"], row["seed"]) for row in rows] == [(name, seed) for seed in (0, 1) for name in names]
    assert all(row["cpu_seconds"] > 0 and 0 <= row["knn"] <= 1 and row["step"] == 4 for row in rows)
    assert capsys.readouterr().out.count(": 4 steps done") == 4  # none was trained twice
    assert page.read_text().startswith("before\n<!-- table: small_recipes -->\n\n| ")
    assert page.read_text().count("| raw pixels |") == 1
