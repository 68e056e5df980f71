"""The losses of compat with heads that FSDP2 has sharded over two ranks: a step gives what one process gives."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from gloo import run_on_ranks
from vmf_heads.compat import dino, dinov2, esvit, lightly, solo, stable_pretraining

pytestmark = pytest.mark.slow

K, P, WIDTH, IMAGES = 31, 8, 16, 6  # two ranks cannot halve 31
PARTS = {"hidden_dim": 16, "bottleneck_dim": P}
Step = Callable[[Any, nn.Module, nn.Module, Tensor], Tensor]
"""The loss of one step, from what `attach` was given and crops (4, images, WIDTH), the global ones first."""


def dino_step(loss: Any, student: nn.Module, teacher: nn.Module, crops: Tensor) -> Tensor:
    return loss(student(crops.flatten(0, 1)), teacher(crops[:2].flatten(0, 1)), 0)


def solo_step(loss: Any, student: nn.Module, teacher: nn.Module, crops: Tensor) -> Tensor:
    loss.epoch = 0
    return loss(student(crops[:2].flatten(0, 1)), teacher(crops[:2].flatten(0, 1)))


def lightly_step(loss: Any, student: nn.Module, teacher: nn.Module, crops: Tensor) -> Tensor:
    return loss([teacher(crop) for crop in crops[:2]], [student(crop) for crop in crops], epoch=0)


def lightly_patch_step(loss: Any, student: nn.Module, teacher: nn.Module, crops: Tensor) -> Tensor:
    patches = crops.movedim(0, 1).unflatten(1, (2, 2))
    mask = torch.ones(patches.shape[:3], dtype=torch.bool)
    return loss(teacher(patches[mask]), student(patches[mask]), mask)


def centred_step(loss: Any, student: nn.Module, teacher: nn.Module, crops: Tensor) -> Tensor:
    scores = teacher(crops[:2].flatten(0, 1))
    targets = loss.softmax_center_teacher(scores, teacher_temp=0.04)
    loss.update_center(scores)
    loss.softmax_center_teacher(scores, teacher_temp=0.04)  # the next reading is what makes the update
    if isinstance(loss, dinov2.DINOLoss):  # which averages the targets of the crops one by one
        return loss(list(student(crops.flatten(0, 1)).chunk(4)), targets.unflatten(0, (2, -1)).unbind())
    return loss(student(crops), targets.unflatten(0, (2, -1)))


def region_step(loss: Any, student: nn.ModuleDict, teacher: nn.ModuleDict, crops: Tensor) -> Tensor:
    views = crops.flatten(0, 1)
    regions = views.repeat_interleave(4, dim=0) + torch.arange(4.0).repeat(len(views))[:, None]

    def outputs(heads: nn.ModuleDict, images: int) -> tuple[Tensor, Tensor, Tensor, list[int]]:
        own = regions[: 4 * images]
        return heads["head"](views[:images]), heads["head_dense"](own), own, [4] if images < len(views) else [4, 4]

    return loss(outputs(student, len(views)), outputs(teacher, len(views) // 2), epoch=0)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[bool], Any], Step, tuple[bool, ...]]] = {
    "dino": (
        lambda: dino.DINOHead(WIDTH, K, **PARTS),
        lambda fused: dino.DINOLoss(K, 4, 0.04, 0.04, 0, 1, fused=fused),
        dino_step,
        (False, True),
    ),
    "solo": (
        lambda: solo.DINOHead(WIDTH, K, use_bn=False, **PARTS),
        lambda fused: solo.DINOLoss(K, 0.04, 0.04, 0, 1, fused=fused),
        solo_step,
        (False, True),
    ),
    "lightly": (
        lambda: lightly.DINOProjectionHead(WIDTH, 16, P, K, batch_norm=False),
        lambda fused: lightly.DINOLoss(K, warmup_teacher_temp_epochs=1, fused=fused),
        lightly_step,
        (False, True),
    ),
    "lightly, patches": (
        lambda: lightly.DINOv2ProjectionHead(WIDTH, 16, P, K, batch_norm=False),
        lambda fused: lightly.IBOTPatchLoss(K, fused=fused),
        lightly_patch_step,
        (False, True),
    ),
    "dinov2": (
        lambda: dinov2.DINOHead(WIDTH, K, **PARTS),
        lambda fused: dinov2.DINOLoss(K, fused=fused),
        centred_step,
        (False,),  # the original code slices what its heads return, and the HeadOutput of a sharded one has no slices
    ),
    "stable_pretraining": (
        lambda: stable_pretraining.DINOProjector(WIDTH, 16, P, K),
        lambda fused: stable_pretraining.DINOv1Loss(),
        centred_step,
        (False,),
    ),
    "esvit": (
        lambda: nn.ModuleDict({name: esvit.DINOHead(WIDTH, K, **PARTS) for name in ("head", "head_dense")}),
        lambda fused: esvit.DDINOLoss(K, 4, 0.04, 0.04, 0, 1, fused=fused),
        region_step,
        (False, True),
    ),
}
RUNS = [(name, fused) for name, case in CASES.items() for fused in case[-1]]


def training_step(name: str, fused: bool, rank: int | None) -> dict[str, Tensor]:
    """Loss, gradients and centres after a step on 6 images, or on this rank's 3 of them with sharded heads."""
    torch.manual_seed(5)
    make_head, make_loss, step, _ = CASES[name]
    student, teacher = make_head().double(), make_head().double()
    with torch.no_grad():
        for head in (student, teacher):
            for parameter in head.parameters():
                if parameter.shape == (K, 1):
                    parameter.uniform_(0.4, 4)
    if rank is not None:
        for model in (student, teacher):
            for head in model.values() if isinstance(model, nn.ModuleDict) else [model]:
                # Where FSDP2 asks gloo for a mean, gloo of torch 2.8 gives a sum.
                fully_shard(head).set_force_sum_reduction_for_comms(True)
    loss = make_loss(fused)
    loss.attach(student, teacher)
    images = slice(None) if rank is None else slice(3 * rank, 3 * rank + 3)
    value = step(loss, student, teacher, torch.randn(4, IMAGES, WIDTH, dtype=torch.float64)[:, images])
    value.backward()
    grads = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    whole = {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in grads.items()}
    return {"loss": value.detach()} | whole | loss.state_dict()


def of_rank(rank: int) -> list[dict[str, Tensor]]:
    return [training_step(name, fused, rank) for name, fused in RUNS]


@pytest.fixture(scope="module")
def ranks() -> list[list[dict[str, Tensor]]]:
    return run_on_ranks(of_rank)


@pytest.mark.parametrize(("name", "fused"), RUNS)
def test_two_ranks_train_as_one_process(name: str, fused: bool, ranks: list[list[dict[str, Tensor]]]) -> None:
    alone = training_step(name, fused, None)
    found = [of_rank[RUNS.index((name, fused))] for of_rank in ranks]
    mean = sum(result.pop("loss") for result in found) / len(found)
    torch.testing.assert_close(mean, alone.pop("loss"))
    for result in found:
        torch.testing.assert_close(result, alone, rtol=1e-5, atol=1e-6)
