"""`python -m benchmarks distinct`: what it counts, and that differences are those of one seed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import mixture_docs, results
from benchmarks.distinct import report, run

from config.recipe import load_recipe, parse_overrides
from tiny_run import TINY_RUN
from vmf_heads.mixture import VMFMixture, compress_mixture

TINY = (*TINY_RUN, "batch_size=512", "epochs=1", "freeze_last_layer_epochs=0")
ARM = "learnt, KoLeo 1"


def test_the_command_counts_prototypes_and_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "ARMS", {ARM: run.ARMS[ARM]})
    monkeypatch.setattr(run, "LENGTHS", {1: TINY})
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "IMAGE", tmp_path / "picture.svg")
    monkeypatch.setattr(mixture_docs, "update_docs", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run.distinct(seeds=(0,), epochs=(1,), arms=(ARM,), output=tmp_path / "runs")
    (row,) = json.loads(next(tmp_path.glob("distinct_cpu_*.json")).read_text())["rows"]
    assert (row["epochs"], row["arm"], row["seed"]) == (1, ARM, 0)
    assert row["kappa_p50"] == pytest.approx(10, rel=0.2)
    assert 1 <= row["unique"]["0.5"] <= row["unique"]["0.9"] <= 32
    for bound, found in row["compressed"].items():
        assert found["prototypes"] <= 32
        assert found["total_variation"] < float(bound)
    assert f"| 1 | {ARM} | 1 |" in report.table({"rows": [row]})
    assert (tmp_path / "picture.svg").stat().st_size > 1000
    monkeypatch.setattr(run, "measured", None)  # a call would raise
    run.distinct(seeds=(0,), epochs=(1,), arms=(ARM,), output=tmp_path / "runs")


def test_every_arm_is_a_recipe() -> None:
    recipes = [load_recipe(run.RECIPE, parse_overrides(arm)) for arm in run.ARMS.values()]
    assert [recipe.prototype_koleo_weight for recipe in recipes] == [0, 0.1, 1, 0, 0]
    assert [recipe.online_em.mlp if recipe.online_em else "" for recipe in recipes[2:]] == ["", "keep", "isometric"]


def test_the_change_of_targets_is_what_the_compression_measured() -> None:
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(12, 4, generator=generator).repeat(2, 1) + 0.1 * torch.randn(24, 4, generator=generator)
    mixture = VMFMixture(torch.rand(24, generator=generator), directions, torch.full((24,), 20.0))
    features, _ = mixture.sample(300, generator)
    fewer = compress_mixture(mixture, features, 0.1)
    assert fewer.mixture.num_components < 24
    assert run.changed(mixture, fewer, features) == pytest.approx(fewer.total_variation, rel=1e-4)


def row(arm: str, seed: int, knn: float) -> dict[str, Any]:
    fewer = {"prototypes": 60, "total_variation": 0.01, "total_variation_fresh": 0.02}
    counts = {"unique": {"0.5": 50, "0.9": 128}, "used_targets": 100, "kappa_p50": 11.0}
    return {"epochs": 4, "arm": arm, "seed": seed, "knn": knn, "compressed": {"0.01": fewer, "0.05": fewer}} | counts


def test_differences_are_those_of_one_seed() -> None:
    rows = [row("plain", seed, 0.5 + seed / 10) for seed in (0, 1, 2)] + [row("EM", s, 0.6 + s / 10) for s in (2, 0)]
    table = report.table({"rows": rows})
    assert "| 4 | plain | 3 | 128±0 | 50±0 | 100±0 | 11.0±0.0 | 60.0±5.8 |  |" in table
    assert "| 4 | EM | 2 | 128±0 | 50±0 | 100±0 | 11.0±0.0 | 70.0±10.0 | +10.0±0.0 |" in table
    assert "| 4 | EM | 60±0 | 1.00±0.00 % | 2.00±0.00 % | 60±0 | 1.00±0.00 % | 2.00±0.00 % |" in table
