"""`python -m benchmarks mixture` trains what the library's head and loss train; its measures mean what they say."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from benchmarks import results
from benchmarks.mixture import grids
from benchmarks.mixture import run as command
from benchmarks.mixture.arms import ARMS, Arm
from benchmarks.mixture.measures import clustering, entropies, rank_correlation, spike
from benchmarks.mixture.problem import problem
from benchmarks.mixture.train import Run, Settings
from torch import nn

from vmf_heads import vmf_mean_resultant
from vmf_heads.compat.dino import DINOHead, DINOLoss

P, K, BATCH = 6, 12, 32
SETTINGS = Settings(prototypes=K, norm_speed=3.0, norm_decay=0.1, batch=BATCH)


def library_steps(arm: Arm, directions: torch.Tensor, batches: list[torch.Tensor]) -> tuple[list[float], nn.Module]:
    """The losses and the teacher's head of `compat.dino` on these views."""
    options = {"normalizer": "vmf" if arm.normalization == "vmf" else "none", "nlayers": 1, "bottleneck_dim": P}
    student, teacher = (DINOHead(P, K, norm_last_layer=arm.normalization == "l2", **options) for _ in range(2))
    for head in (student, teacher):
        head.mlp = nn.Identity()
        head.last_layer.weight_v.data.copy_(directions)
    loss_fn = DINOLoss(
        K,
        2,
        SETTINGS.teacher_temp,
        SETTINGS.teacher_temp,
        0,
        1,
        SETTINGS.student_temp,
        centering="logit" if arm.centre == "logit" else "probability",
        center_on="scores" if arm.centre == "logit" else arm.centre,
    )
    loss_fn.attach(student, teacher)
    layer = student.last_layer
    groups = [{"params": [layer.weight_v], "weight_decay": 0.0}]
    if arm.normalization != "l2":
        lr = SETTINGS.lr * SETTINGS.norm_speed
        groups.append({"params": [layer.weight_g], "lr": lr, "weight_decay": SETTINGS.norm_decay})
    optimizer = torch.optim.AdamW(groups, lr=SETTINGS.lr)
    losses = []
    for views in batches:
        loss = loss_fn(student(views), teacher(views), 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for ours, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
                ours.lerp_(theirs, 1 - SETTINGS.teacher_momentum)
        losses.append(loss.item())
    return losses, teacher.last_layer


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm.centre != "targets"], ids=lambda arm: arm.name)
def test_a_run_is_that_of_the_library(arm: Arm) -> None:
    data = problem(P, [0, 1], clusters=4, count=20)
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(2, K, P, generator=generator)
    batches = [data.views(BATCH, generator) for _ in range(4)]
    run = Run(arm, SETTINGS, directions)
    losses = torch.stack([run.step(views) for views in batches])
    for seed in range(2):
        expected, layer = library_steps(arm, directions[seed], [views[seed] for views in batches])
        torch.testing.assert_close(losses[:, seed], torch.tensor(expected), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(run.teacher[0][seed], layer.weight_v.data, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(run.teacher[1][seed], layer.weight_g.data[:, 0], rtol=1e-5, atol=1e-5)


def test_clustering_counts_majorities_and_ranks_norms() -> None:
    """Prototypes 0 and 1 win cluster 0, prototype 2 wins clusters 1 and 2; prototype 3 wins nothing."""
    cluster = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    winner = torch.tensor([0, 0, 1, 1, 2, 2, 2])
    found = clustering(
        winner, cluster, torch.tensor([2.0, 2.5, 1.0, 9.0]), torch.randn(7, 3), torch.tensor([9.0, 5, 1])
    )
    assert found["purity"] == pytest.approx(6 / 7)
    assert found["clusters_found"] == pytest.approx(2 / 3)
    assert found["rank_correlation"] == pytest.approx(0.866, abs=1e-3)
    assert found["rank_correlation_own"] is None, "no prototype won 20 points"


def test_a_rank_correlation_of_equal_norms_is_not_a_number() -> None:
    assert rank_correlation(torch.ones(5), torch.arange(5.0)) is None
    assert rank_correlation(torch.arange(5.0), torch.arange(5.0).exp()) == pytest.approx(1)


def test_entropies_are_one_where_targets_are_uniform_and_where_they_are_balanced() -> None:
    uniform = entropies(torch.full((8, 4), 0.25))
    assert uniform["target_entropy"] == uniform["marginal_entropy"] == pytest.approx(1)
    balanced = entropies(torch.eye(4).repeat(2, 1))
    assert balanced["target_entropy"] == pytest.approx(0)
    assert balanced["marginal_entropy"] == pytest.approx(1)
    collapsed = entropies(torch.eye(4)[:1].repeat(8, 1))
    assert collapsed["marginal_entropy"] == collapsed["mean_target_min"] == 0
    assert collapsed["mean_target_max"] == 4


def test_a_spike_is_a_rise_and_a_falling_loss_has_none() -> None:
    falling = torch.linspace(4, 1, 1000)
    assert spike(falling) < 0
    jump = falling.clone()
    jump[500:510] += 2
    assert spike(jump) == pytest.approx(2, abs=0.3)


@pytest.mark.parametrize("kind", ["cosines", "overlap"])
def test_points_have_the_mean_cosine_of_their_concentration(kind: str) -> None:
    data = problem(8, [0], kind=kind, clusters=4, count=4000)
    found = torch.einsum("scnp,scp->sc", data.points, data.means)[0] / 4000
    torch.testing.assert_close(found, vmf_mean_resultant(data.kappa, 8), atol=0.01, rtol=0)
    assert 0.5 < data.oracle_purity() <= 1


def test_views_are_pairs_of_one_cluster() -> None:
    data = problem(16, [0, 1], kind="overlap")
    first, second = data.views(64, torch.Generator().manual_seed(0)).chunk(2, dim=1)
    nearest = [torch.einsum("snp,scp->snc", view, data.means).argmax(-1) for view in (first, second)]
    assert (nearest[0] == nearest[1]).float().mean() > 0.8
    assert not torch.equal(first, second)


def test_the_command_writes_every_row_and_goes_on_where_it_stopped(tmp_path: Path, monkeypatch, capsys) -> None:
    cases = [case for case in grids.readings() if case.p == 8][:3]
    tiny = [dataclasses.replace(case, settings=Settings(prototypes=4, steps=3, batch=8)) for case in cases]
    monkeypatch.setitem(command.GRIDS, "readings", lambda: iter(tiny[:2]))
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    command.mixture(output=tmp_path)
    monkeypatch.setitem(command.GRIDS, "readings", lambda: iter(tiny))
    capsys.readouterr()
    command.mixture(output=tmp_path)
    assert tiny[0].arm.name not in capsys.readouterr().out
    found = json.loads(next((tmp_path / "results").iterdir()).read_text())
    assert [row["arm"] for row in found["rows"]] == [case.arm.name for case in tiny for _ in command.SEEDS]
    assert {row["seed"] for row in found["rows"]} == set(command.SEEDS)


def test_every_grid_names_each_case_once() -> None:
    for name, grid in grids.GRIDS.items():
        keys = [(case.arm, case.p, case.kind, case.settings) for case in grid()]
        assert len(keys) == len(set(keys)) > 0, name
