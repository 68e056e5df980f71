"""Two ranks that each see half of the images average to the gradients of one process: DDP, FSDP2, fused or not."""

import warnings
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dino_models import NCROPS, K, P, crops, dino_loss, models
from gloo import run_on_ranks

CASES = list(product(["DDP", "DDP, finding unused parameters", "FSDP2"], ["fused", "unfused"]))
IMAGES = 6


def gradients(wrap: str, fused: bool, rank: int | None) -> dict[str, Tensor]:
    """d loss / d parameter of the second step on 6 images, or on this rank's 3 of them; the centre has moved once."""
    torch.manual_seed(5)
    student, teacher = (m.double() for m in models())  # float64, so that a wrong sum cannot hide in rounding
    student, teacher = _wrapped(student, wrap), _wrapped(teacher, "FSDP2" if wrap == "FSDP2" else "none")
    loss = dino_loss(fused=fused).double()
    loss.attach(student, teacher)
    for epoch in range(2):
        x = crops(IMAGES).double()
        if rank is not None:
            x = x.unflatten(0, (NCROPS, IMAGES))[:, 3 * rank : 3 * rank + 3].flatten(0, 1)
        student.zero_grad()
        loss(student(x), teacher(x[: 2 * len(x) // NCROPS]), epoch).backward()
    return {name.removeprefix("module."): _whole(p.grad) for name, p in student.named_parameters()}


def _wrapped(model: nn.Module, wrap: str) -> nn.Module:
    if wrap.startswith("DDP"):
        return DistributedDataParallel(model, find_unused_parameters="unused" in wrap)
    if wrap == "FSDP2":
        mesh = init_device_mesh("cpu", (2,))
        fully_shard(model.head, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    return model


class Traffic(TorchDispatchMode):
    """Counts what a step gathers and copies that is as large as all prototypes."""

    def __init__(self) -> None:
        super().__init__()
        self.gathers = self.copies = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name, made = str(function), [x for x in tree_leaves((args, result)) if torch.is_tensor(x)]
        self.gathers += "allgather" in name and max(x.numel() for x in made) >= K * P
        self.copies += function is torch.ops.aten.clone.default and result.shape == (K, P)
        return result


def traffic_of_rank(rank: int) -> list[list[int]]:
    """[gathers, copies] of two training steps under FSDP2."""
    torch.manual_seed(5)
    student, teacher = (_wrapped(m, "FSDP2") for m in models())
    loss = dino_loss(fused=True)
    loss.attach(student, teacher)
    counts = []
    for epoch in range(2):
        x = crops(5)  # features of another shape than the prototypes
        with Traffic() as traffic, warnings.catch_warnings():
            warnings.filterwarnings("error", "FSDP2-wrapped module")  # of outputs that it cannot hook safely
            loss(student(x), teacher(x[: 2 * len(x) // NCROPS]), epoch).backward()
        counts.append([traffic.gathers, traffic.copies])
    return counts


def test_a_step_gathers_each_head_once_and_copies_only_the_prototypes_of_the_teacher() -> None:
    assert run_on_ranks(traffic_of_rank) == [[[2, 1]] * 2] * 2


def _whole(gradient: Tensor) -> Tensor:
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


def gradients_of_rank(rank: int) -> list[dict[str, Tensor]]:
    return [gradients(wrap, mode == "fused", rank) for wrap, mode in CASES]


@pytest.fixture(scope="module")
def ranks() -> list[list[dict[str, Tensor]]]:
    return run_on_ranks(gradients_of_rank)


@pytest.mark.parametrize("case", CASES, ids=", ".join)
def test_gradients_of_two_ranks_are_those_of_one_process(
    case: tuple[str, str], ranks: list[list[dict[str, Tensor]]]
) -> None:
    alone = gradients("none", False, None)
    for got in ranks:
        torch.testing.assert_close(got[CASES.index(case)], alone)
