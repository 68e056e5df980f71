"""compat.ibot on two ranks with unequal batches and masks: they train as one process does."""

from itertools import product

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from gloo import run_on_ranks
from ibot_models import BATCH, ibot_loss, models, views

MODES = ["plain", "fused", "fused, finding unused parameters", "fused, sharded"]
CASES = list(product(["default", "none shared"], MODES))
IMAGES = 6


def training(heads: str, mode: str, rank: int | None) -> dict[str, Tensor]:
    """Three steps on 6 images, or on this rank's 3 of them; rank 1 has not one masked patch."""
    torch.manual_seed(5)
    student, teacher = models(heads)
    wrapped = student
    if rank is not None and "sharded" in mode:
        for model in (student, teacher):
            for part in (model.head, model):
                # Where FSDP2 asks gloo for a mean, gloo of torch 2.8 gives a sum.
                fully_shard(part).set_force_sum_reduction_for_comms(True)
    elif rank is not None:
        wrapped = DistributedDataParallel(student, find_unused_parameters="unused" in mode)
    loss = ibot_loss(heads, fused="fused" in mode)
    loss.attach(wrapped, teacher)
    for epoch in range(3):
        tokens, local_tokens, masks = views(IMAGES)
        for mask in masks:
            mask[3:] = False
        if rank is not None:
            own = slice(3 * rank, 3 * rank + 3)
            tokens, local_tokens = (x.unflatten(0, (2, IMAGES))[:, own].flatten(0, 1) for x in (tokens, local_tokens))
            masks = [mask[own] for mask in masks]
        student.zero_grad()
        losses = loss(wrapped(tokens), teacher(tokens), wrapped(local_tokens)[0], masks, epoch)
        losses["loss"].backward()
        with torch.no_grad():
            for parameter in student.parameters():
                parameter -= 0.1 * parameter.grad
    return {name: whole(p.grad) for name, p in student.named_parameters()} | loss.state_dict()


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def centers(images: slice, fused: bool) -> dict[str, Tensor]:
    """Both centres after one step of these of 5 images."""
    torch.manual_seed(3)
    student, teacher = models()
    loss = ibot_loss(fused=fused)
    loss.attach(student, teacher)
    tokens, local_tokens, masks = views()
    tokens, local_tokens = (x.unflatten(0, (2, BATCH))[:, images].flatten(0, 1) for x in (tokens, local_tokens))
    masks = [mask[images] for mask in masks]
    loss(student(tokens), teacher(tokens), student(local_tokens)[0], masks, 0)
    return dict(loss.state_dict())


def results_of_rank(rank: int) -> dict[str, list[dict[str, Tensor]]]:
    images = slice(0, 2) if rank == 0 else slice(2, 5)
    return {
        "training": [training(*case, rank) for case in CASES],
        "centers": [centers(images, fused) for fused in (False, True)],
    }


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, list[dict[str, Tensor]]]]:
    return run_on_ranks(results_of_rank)


@pytest.mark.parametrize("case", CASES, ids=", ".join)
def test_two_ranks_equal_one_process(case, ranks):
    alone = training(case[0], "plain", None)
    for got in ranks:
        torch.testing.assert_close(got["training"][CASES.index(case)], alone, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_ranks_with_unequal_batches_have_the_centres_of_one_process(fused, ranks):
    want = centers(slice(None), False)
    for got in ranks:
        torch.testing.assert_close(got["centers"][fused], want, rtol=1e-5, atol=1e-6)
