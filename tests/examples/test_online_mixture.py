"""Prototypes by online EM: they become a known mixture, checkpoints hold them, and no gradient reaches them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pretrain
from config.recipe import load_recipe
from methods.online_mixture import OnlineMixture
from tiny_run import TINY_RUN
from training.log import METRICS
from training.run import load_checkpoint, load_run
from vmf_heads import VMFPrototypeHead
from vmf_heads.centering import teacher_targets
from vmf_heads.mixture import VMFMixture

SETTINGS = {"mlp": "keep", "rows_per_prototype": 50, "max_kappa": 1000, "median_kappa": 0}
TAU = 0.1


def online_mixture(components: int, dim: int, **settings: float) -> OnlineMixture:
    recipe = load_recipe(
        "photos_dino_vmf",
        {"out_dim": components, "bottleneck_dim": dim, "student_temp": TAU, "online_em": SETTINGS | settings},
    )
    return OnlineMixture(recipe.online_em, recipe)


def known() -> VMFMixture:
    return VMFMixture(torch.tensor([1.0, 2, 3, 2]), torch.eye(6)[:4] + 0.1, torch.tensor([20.0, 30.0, 40.0, 60.0]))


def learn(mixture: OnlineMixture, truth: VMFMixture, steps: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        for _ in range(2):  # micro-batches
            mixture.collect(truth.sample(128, generator)[0])
        found = mixture.update_()
    return found


def test_heads_get_the_targets_of_the_mixture_that_the_features_come_from() -> None:
    truth, mixture = known(), online_mixture(4, 6)
    mixture.start_(VMFMixture(torch.ones(4), torch.eye(6)[:4] + 0.3, torch.full((4,), 10.0)))
    learn(mixture, truth, 30)
    head = VMFPrototypeHead(8, 4, bottleneck_dim=6)
    mixture.write_(head)
    features, _ = truth.sample(500, torch.Generator().manual_seed(1))
    scores = head.last_layer(features, exact=True)
    targets = teacher_targets(
        scores, TAU, log_normalizer=head.log_normalizer(TAU), log_center=-mixture.of_heads().weights.log()
    )
    assert (targets - truth.responsibilities(features)).abs().sum(1).mean() / 2 < 0.02
    assert (mixture.kappa / truth.kappa - 1).abs().max() < 0.15


def test_kappa_in_the_heads_may_have_another_median_and_keeps_its_ratios() -> None:
    mixture = online_mixture(4, 6, median_kappa=10, max_kappa=35)
    mixture.start_(known())
    assert mixture.kappa.tolist() == [20, 30, 35, 35]
    torch.testing.assert_close(mixture.of_heads().kappa, mixture.kappa / mixture.kappa.median() * 10)


def test_a_component_without_rows_is_moved_to_one_that_is_explained_badly() -> None:
    truth, mixture = known(), online_mixture(4, 6)
    away = VMFMixture(truth.weights, torch.cat([truth.directions[:3], -truth.directions[:1]]), truth.kappa)
    mixture.start_(away)  # no component stands where the fourth true one is
    moved = learn(mixture, truth, 1)["mixture_empty"]
    for _ in range(40):
        moved += learn(mixture, truth, 1)["mixture_empty"]
    assert moved >= 1
    assert (truth.directions @ mixture.directions.T).amax(dim=1).min() > 0.95


TINY = (*TINY_RUN, "epochs=1", f"online_em={json.dumps(SETTINGS | {'median_kappa': 10})}")


def run(output: Path, **options: Any) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    pretrain.main(pretrain.Options("photos_dino_vmf", output, overrides=TINY, **options))
    rows = [json.loads(line) for line in (output / METRICS).read_text().splitlines()]
    timing = ("seconds", "images_per_second")
    without = [{name: value for name, value in row.items() if name not in timing} for row in rows]
    return without, load_checkpoint(output)["method"]


def test_a_run_in_two_parts_is_the_whole_run_and_its_prototypes_are_the_mixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    rows, whole = run(tmp_path / "whole", max_steps=4)
    run(tmp_path / "parts", max_steps=2)
    resumed, parts = run(tmp_path / "parts", max_steps=4, resume=True)
    assert resumed == rows
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    kappa = whole["mixture.kappa"] * (10 / whole["mixture.kappa"].median())
    for network in ("student", "teacher"):
        torch.testing.assert_close(whole[f"{network}.head.last_layer.weight_g"], TAU * kappa[:, None])
        directions = torch.nn.functional.normalize(whole[f"{network}.head.last_layer.weight_v"], dim=1)
        torch.testing.assert_close(directions, whole["mixture.directions"])
    optimizer = load_checkpoint(tmp_path / "whole")["optimizer"]
    assert len(optimizer["state"]) < sum(len(group["params"]) for group in optimizer["param_groups"])
    torch.testing.assert_close(load_run(tmp_path / "whole").method.mixture.kappa, whole["mixture.kappa"])
