"""Prototypes cut over ranks: the same losses, gradients, centres and training as on one rank."""

from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn import functional as F

from cross_entropy_problems import gradients, problem
from gloo import run_on_ranks
from vmf_heads import HeadOutput, prototype_cross_entropy
from vmf_heads.cross_entropy import prototype_cross_entropy_reference

RANKS = (2, 4)
K, P = 25, 6  # 2 ranks hold 13 and 12 prototypes; 4 hold 7, 7, 7 and 4
LOSSES = list(product([False, True], [False, True], ["responsibilities", "scores"]))


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def meshes(ranks: int) -> dict[str, DeviceMesh]:
    found = {"1-D": init_device_mesh("cpu", (ranks,))}
    return found | ({"2-D": init_device_mesh("cpu", (2, ranks // 2))} if ranks > 2 else {})


def cut(output: HeadOutput, mesh: DeviceMesh) -> HeadOutput:
    placements = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]
    features, *prototypes = output
    cuts = [
        None
        if x is None
        else distribute_tensor(x.detach(), mesh, placements, src_data_rank=None).requires_grad_(x.requires_grad)
        for x in prototypes
    ]
    return HeadOutput(features, *cuts)


def arguments(rank: int, *, scales: bool, same_position: bool, center_on: str) -> dict[str, Any]:
    """Of this rank: rows of its own, of which every rank has another number, and prototypes that all share."""
    torch.manual_seed(0)
    shared = problem((2, 2, K, P, 1), scales=scales)
    torch.manual_seed(1 + rank)
    rows = 3 + 2 * rank
    own = problem((rows, rows if same_position else 2 + rank, K, P, 2), same_position=same_position)
    if same_position:
        own["weights"] = own["weights"][:, :1]
    for side in ("student", "teacher"):
        own[side] = HeadOutput(own[side].features, shared[side].directions, shared[side].scales)
    return own | {"log_center": shared["log_center"], "center_on": center_on, "batch_chunk_size": 7}


def losses_of_rank(rank: int) -> dict[str, Any]:
    """Loss, statistics and gradients, by the kind of mesh and of the loss."""
    results = {}
    for (kind, mesh), case in product(meshes(dist.get_world_size()).items(), LOSSES):
        names = ("scales", "same_position", "center_on")
        given = arguments(rank, **dict(zip(names, case, strict=True)))
        given |= {side: cut(given[side], mesh) for side in ("student", "teacher")}
        loss, log_sum, rows = prototype_cross_entropy(**given)
        found = gradients(3 * loss, given)
        assert all(isinstance(found[name], DTensor) for name in found if name != "features")
        statistics = torch.cat([log_sum.exp(), log_sum.new_tensor([rows])])
        dist.all_reduce(statistics)
        results[f"{kind} {case}"] = {
            "loss": loss.detach(),
            "statistics": statistics,
            "gradients": {name: whole(gradient) for name, gradient in found.items()},
        }
    return results


@pytest.fixture(scope="module", params=RANKS)
def losses(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return run_on_ranks(losses_of_rank, request.param)


@pytest.mark.parametrize("case", LOSSES)
def test_every_rank_has_the_loss_and_the_gradients_of_its_rows(case: tuple[bool, bool, str], losses: Any) -> None:
    expected, statistics, of_prototypes = [], 0, {}
    for rank in range(len(losses)):
        given = arguments(rank, **dict(zip(("scales", "same_position", "center_on"), case, strict=True)))
        del given["batch_chunk_size"]
        loss, log_sum, rows = prototype_cross_entropy_reference(**given)
        found = gradients(3 * loss, given)
        expected.append({"loss": loss.detach(), "gradients": {"features": found.pop("features")}})
        statistics = statistics + torch.cat([log_sum.exp(), log_sum.new_tensor([rows])])
        for name, gradient in found.items():
            of_prototypes[name] = of_prototypes.get(name, 0) + gradient / len(losses)
    for rank, results in enumerate(losses):
        for name, result in results.items():
            if name.endswith(str(case)):
                want = {**expected[rank], "statistics": statistics}
                want["gradients"] = want["gradients"] | of_prototypes
                torch.testing.assert_close(result, want, rtol=1e-9, atol=1e-11)
