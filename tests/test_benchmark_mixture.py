"""`python -m benchmarks mixture` trains what the library's head and loss train, and its measures mean what they say."""

import json
from pathlib import Path

import pytest
import torch
from benchmarks.mixture import run as command
from benchmarks.mixture.arms import ARMS, Arm, Centre
from benchmarks.mixture.measures import clustering, entropies, rank_correlation, spike
from benchmarks.mixture.problem import problem
from benchmarks.mixture.train import Run, Settings
from torch import nn

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
