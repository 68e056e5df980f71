"""compat.dino under DistributedDataParallel: two ranks train as one process does."""

from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from dino_models import NCROPS, crops, dino_loss, models
from gloo import run_on_ranks

CASES = list(product(["logit", "probability"], ["plain", "fused", "fused, finding unused parameters"]))
IMAGES = 6


def training(centering: str, mode: str, rank: int | None) -> dict[str, Tensor]:
    """Three steps on 6 images, or on this rank's 3 of them; the last gradients and the state of the loss."""
    torch.manual_seed(5)
    student, teacher = models()
    wrapped = student
    if rank is not None:
        wrapped = DistributedDataParallel(student, find_unused_parameters="unused" in mode)
    loss = dino_loss(centering=centering, fused="fused" in mode)
    loss.attach(wrapped, teacher)
    for epoch in range(3):
        x = crops(IMAGES)
        if rank is not None:
            x = x.unflatten(0, (NCROPS, IMAGES))[:, 3 * rank : 3 * rank + 3].flatten(0, 1)
        student.zero_grad()
        loss(wrapped(x), teacher(x[: 2 * len(x) // NCROPS]), epoch).backward()
        with torch.no_grad():
            for parameter in student.parameters():
                parameter -= 0.5 * parameter.grad
    return {name: p.grad for name, p in student.named_parameters()} | loss.state_dict()


def training_of_rank(rank: int) -> list[dict[str, Tensor]]:
    return [training(*case, rank) for case in CASES]


@pytest.fixture(scope="module")
def ranks() -> list[list[dict[str, Tensor]]]:
    return run_on_ranks(training_of_rank)


@pytest.mark.parametrize("case", CASES, ids=", ".join)
def test_two_ranks_under_ddp_equal_one_process(case, ranks):
    alone = training(case[0], "plain", None)
    for got in ranks:
        torch.testing.assert_close(got[CASES.index(case)], alone, rtol=1e-3, atol=1e-5)
