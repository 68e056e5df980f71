"""`python -m benchmarks small-recipes` goes on where it stopped, and docs/examples.md shows what it found."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks import marked_tables, results, small_recipes
from PIL import Image

from config.recipe import load_recipe, save_recipe

SHOWN = marked_tables.names(small_recipes.DOCS.read_text())


def test_the_page_shows_the_committed_results() -> None:
    page = small_recipes.DOCS.read_text()
    assert set(SHOWN) <= set(small_recipes.RECIPES)
    assert small_recipes.rendered(page) == page, "run `python -m benchmarks small-recipes`"


@pytest.mark.parametrize("size", SHOWN)
def test_the_page_says_which_recipes_beat_raw_pixels_and_their_untrained_network_in_every_seed(size: str) -> None:
    result = results.latest(size)
    assert {row["recipe"] for row in result["rows"]} <= set(small_recipes.RECIPES[size])
    for row in result["rows"]:
        for protocol, pixels in result["raw_pixels"].items():
            if (row["recipe"], protocol) == ("small28_ibot_vmf", "knn"):  # in one seed of three above raw pixels
                assert row[protocol] > row["untrained"][protocol]
                assert abs(row[protocol] - pixels) < 0.005
            elif (row["recipe"], protocol) == ("small64_ibot_vmf", "knn"):
                assert row[protocol] > pixels
            else:
                beaten = row[protocol] > max(pixels, row["untrained"][protocol])
                assert beaten == ((row["recipe"], protocol) != ("small28_msn_vmf", "knn")), row


def test_the_page_says_which_recipe_is_not_better_than_its_untrained_network() -> None:
    rows = [row for row in results.latest("small64")["rows"] if row["recipe"] == "small64_ibot_vmf"]
    assert not all(row["knn"] > row["untrained"]["knn"] for row in rows)


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
    page.write_text("before\n<!-- table: small28 -->\n<!-- end -->\nafter\n")
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
    assert page.read_text().startswith("before\n<!-- table: small28 -->\n\n| ")
    assert page.read_text().count("| raw pixels |") == 1
    # The two recipes have one network, so the second one has no evaluation of it.
    assert [row["untrained"] for row in rows[::2]] == [row["untrained"] for row in rows[1::2]]
    evaluated = [(tmp_path / "runs" / f"{name}-seed0" / "results.jsonl").read_text() for name in ("one", "two")]
    assert ['"random"' in text for text in evaluated] == [True, False]
