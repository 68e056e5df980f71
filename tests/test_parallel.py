"""Prototypes cut over ranks: the same losses, gradients, centres and training as on one rank."""

import copy
from collections import Counter
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cross_entropy_problems import gradients, problem
from gloo import run_on_ranks
from sharded_training import CASES, NCROPS, TOLERANCES, K, P, build, meshes, training, whole
from vmf_heads import HeadOutput, prototype_cross_entropy, prototype_report
from vmf_heads.compat.dino import DINOLoss
from vmf_heads.cross_entropy import prototype_cross_entropy_reference
from vmf_heads.parallel import shard_prototypes
from vmf_heads.prototypes import LinearPrototypes

pytestmark = pytest.mark.slow  # to start the ranks takes ten seconds

RANKS = (2, 4)
LOSSES = list(product([False, True], [False, True], ["responsibilities", "scores"]))


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
    rows = 2 * rank  # the first has none
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


RUNS = [(ranks, case) for ranks in RANKS for case in CASES if ("2-D" in case) == (ranks > 2)]


def of_rank(rank: int) -> dict[str, Any]:
    """All results of one group of ranks, because starting one takes longer than most of this."""
    cases = [case for ranks, case in RUNS if ranks == dist.get_world_size()]
    unsharded = {case: training(case, rank, whole_prototypes=True) for case in cases if "bfloat16" in case}
    return {
        "losses": losses_of_rank(rank),
        "training": {case: training(case, rank) for case in cases},
        "unsharded": unsharded,
        "other": other(rank) if dist.get_world_size() == 2 else {},
    }


@pytest.fixture(scope="module")
def groups() -> dict[int, list[dict[str, Any]]]:
    return {ranks: run_on_ranks(of_rank, ranks) for ranks in RANKS}


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("case", LOSSES)
def test_every_rank_has_the_loss_and_the_gradients_of_its_rows(
    case: tuple[bool, bool, str], ranks: int, groups: Any
) -> None:
    losses = [results["losses"] for results in groups[ranks]]
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


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return {case: training(case, None) for case in CASES}


@pytest.mark.parametrize(("ranks", "case"), RUNS)
def test_ten_steps_are_those_of_one_rank_with_all_images(ranks: int, case: str, groups: Any, alone: Any) -> None:
    found = [results["training"][case] for results in groups[ranks]]
    losses = torch.stack([result["losses"] for result in found])
    # Under autocast, sums over other sets of images are rounded otherwise: there the same ranks, with whole prototypes.
    unsharded = [results["unsharded"].get(case, alone[case]) for results in groups[ranks]]
    tolerances = TOLERANCES[CASES[case][3]]
    want = torch.stack([result["losses"] for result in unsharded]).mean(dim=0)
    torch.testing.assert_close(losses.mean(dim=0), want, **tolerances)
    assert (losses.std(dim=0) > 0).all()  # every rank has images of its own
    for result, expected in zip(found, unsharded, strict=True):
        torch.testing.assert_close(result | {"losses": want}, expected | {"losses": want}, **tolerances)


class Traffic(TorchDispatchMode):
    """What collectives were called with: their names and the number of elements of their largest tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            self.calls.append(str(function).split(".")[1].strip("_").removesuffix("_base"))
            self.largest = max(self.largest, *(x.numel() for x in tree_leaves(args) if torch.is_tensor(x)))
        return function(*args, **(kwargs or {}))


def refusal(function: Any, *args: Any, **kwargs: Any) -> str:
    try:
        function(*args, **kwargs)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "no error"


def other(rank: int) -> dict[str, Any]:
    """What else there is to know of prototypes that are cut over two ranks: (found, wanted), messages, traffic."""
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(5)
    student, teacher, loss = build("dino", {})
    original = copy.deepcopy(student)
    shard_prototypes(student, mesh), shard_prototypes(teacher, mesh)
    features = F.normalize(torch.randn(50, P), dim=1)
    own = features[:20] if rank else features[20:]  # of another number
    with torch.no_grad():
        equal = {
            "scores": (student.head.last_layer(own), original.head.last_layer(own)),
            "logits": (student(own @ torch.ones(P, 10)), original(own @ torch.ones(P, 10))),
            "gathered": (student.head.last_layer.gathered(), original.head.last_layer.weight.detach()),
            "report": (prototype_report(student, own).as_dict(), prototype_report(original, own).as_dict()),
        }
    before = {name: whole(x).clone() for name, x in student.state_dict().items()}
    student.load_state_dict({name: x + 1 for name, x in original.state_dict().items()})
    equal["loaded"] = ({name: whole(x) - 1 for name, x in student.state_dict().items()}, before)
    linear = shard_prototypes(LinearPrototypes(P, K), mesh)
    linear.load_state_dict({"weight": torch.ones(K, P)})
    equal["linear"] = (linear.gathered(), torch.ones(K, P))

    group = dist.new_group([0])
    messages = {
        "unfused": refusal(DINOLoss(K, 3, 0.04, 0.07, 3, 9).attach, student, teacher),
        "whole teacher": refusal(loss.attach, student, original),
        "group": refusal(DINOLoss(K, 3, 0.04, 0.07, 3, 9, fused=True, process_group=group).attach, student, teacher),
        "twice": refusal(shard_prototypes, student, mesh),
        "few": refusal(shard_prototypes, LinearPrototypes(P, 1), mesh),
        "none": refusal(shard_prototypes, nn.Linear(2, 2), mesh),
        "mesh": refusal(shard_prototypes, original, init_device_mesh("cpu", (1, 1, 2))),
        "gradient": refusal(student.head, torch.randn(2, 16)),
        "weight": refusal(lambda: student.head.last_layer.weight),
        "sides": refusal(
            prototype_cross_entropy,
            student.head.last_layer.with_features(own),
            original.head.last_layer.with_features(own),
            student_temperature=0.1,
            teacher_temperature=0.1,
        ),
    }
    shards = shard_prototypes(copy.deepcopy(original).requires_grad_(False), mesh)
    messages["copy"] = refusal(loss.attach, copy.deepcopy(student), shards)  # a copy is cut, too: no error
    loss.attach(student, teacher)
    views = torch.randn(NCROPS * 4, 10)
    with Traffic() as traffic:
        value = loss(student(views), teacher(views[:8]), 0)
        value.backward(retain_graph=True)
    messages["factors"] = refusal((value * (1 + rank)).backward)
    return {"equal": equal, "messages": messages, "calls": traffic.calls, "largest": traffic.largest}


@pytest.mark.parametrize("name", ["scores", "logits", "gathered", "report", "loaded", "linear"])
def test_what_a_head_knows_of_all_prototypes(name: str, groups: Any) -> None:
    for results in groups[2]:
        torch.testing.assert_close(*results["other"]["equal"][name], rtol=1e-5, atol=1e-6)


def test_rows_are_sent_and_nothing_with_a_column_for_each_prototype(groups: Any) -> None:
    rows = NCROPS * 4
    for results in groups[2]:
        assert Counter(results["other"]["calls"]) == {
            "allgather": 1 + 2 + 3,  # counts; features and weights of student and teacher; what targets are summed with
            "allreduce": 2
            + 2
            + 1
            + 1,  # maximum and sum of student and of teacher; the centre; a check in the backward
            "reduce_scatter": 1 + 2,  # gradients of features; T W and T b
        }
        assert results["other"]["largest"] == 2 * rows * P < rows * K


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("unfused", "`fused` (=False) must be True for prototypes that are cut over ranks"),
        ("whole teacher", "the prototypes of the teacher must be cut over the ranks as those of the student are"),
        ("group", "`process_group` (of ranks [0]) must hold all ranks that the prototypes are cut over ([0, 1])"),
        ("twice", "the prototypes in `module` are cut over ranks already"),
        ("few", "one would get none of 1 prototypes"),
        ("none", "`module` (a Linear) must contain the prototypes of a head"),
        ("mesh", "`mesh` (of 3 dimensions) must have one (shards) or two (copies, shards)"),
        ("gradient", "scores of prototypes that are cut over ranks have no gradient"),
        ("weight", "the prototypes are cut over ranks, so that no rank has them all"),
        ("sides", "`teacher.directions` (placed: ()) must be cut over ranks as `student.directions` is"),
        ("copy", "no error"),
        ("factors", "the loss was multiplied by "),
    ],
)
def test_what_is_refused(name: str, message: str, groups: Any) -> None:
    for results in groups[2]:
        assert message in results["other"]["messages"][name]
