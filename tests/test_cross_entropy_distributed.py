"""Two ranks that each see half of the images average to the gradients of one process: DDP, FSDP2, fused or not."""

from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from dino_models import NCROPS, crops, dino_loss, models
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
