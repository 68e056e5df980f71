"""`prototype_cross_entropy` never holds the logits: no tensor it makes has N * K elements."""

import gc
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cross_entropy_problems import problem, reference
from dino_models import crops, dino_loss, models
from test_cross_entropy import CENTER_ON, SAME_POSITION, SCALES
from vmf_heads import _row_groups, prototype_cross_entropy
from vmf_heads._memory import CHUNK_BYTES

NS, NT, K, P, M = 60, 40, 211, 3, 2


class LargestResult(TorchDispatchMode):
    """Records the most elements of any tensor that an operator returns."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if torch.is_tensor(leaf)]
        self.elements = max([self.elements, *sizes])
        return result


class NewTensors(TorchDispatchMode):
    """The addresses of the results of some shape that have memory of their own."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape
        self.addresses: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)}
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if torch.is_tensor(x) and x.shape == self.shape and x.untyped_storage().data_ptr() not in before:
                self.addresses.append(x.data_ptr())
        return result


@pytest.mark.parametrize(
    ("frozen", "made"),
    [([], 1), (["scales"], 1), (["directions"], 1), (["directions", "scales"], 0)],
    ids=str,
)
@pytest.mark.parametrize("upstream", [1.0, 3.0])
@SAME_POSITION
def test_of_directions_and_scales_only_the_gradient_of_directions_is_made(
    same_position: bool, upstream: float, frozen: list[str], made: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmf_heads._memory.CACHE_BYTES", 4 * 16 * 30)
    arguments = problem(shape(same_position, p=16), scales=True, same_position=same_position)
    student = arguments["student"]
    for name in frozen:
        getattr(student, name).requires_grad_(False)
    with NewTensors((K, 16)) as new:
        loss = prototype_cross_entropy(**arguments, batch_chunk_size=4)[0]
    assert len(new.addresses) == made
    (upstream * loss).backward()
    if "directions" not in frozen:  # it is what the forward pass made, and no copy, whatever a GradScaler does
        assert [student.directions.grad.data_ptr()] == new.addresses
    with NewTensors((K, 16)) as new:
        reference(arguments)
    assert len(new.addresses) > made


@SCALES
@CENTER_ON
@SAME_POSITION
def test_no_tensor_is_larger_than_a_chunk_or_a_gradient(same_position: bool, center_on: str, scales: bool) -> None:
    arguments = problem(shape(same_position), scales=scales, same_position=same_position)
    largest = LargestResult()
    with largest:
        prototype_cross_entropy(**arguments, batch_chunk_size=4, center_on=center_on)[0].backward()
    assert K * P <= largest.elements <= max(4 * K, K * P, NS * P)


def test_the_recorder_sees_the_logits_of_the_reference() -> None:
    largest = LargestResult()
    with largest:
        reference(problem(shape(False)))[0].backward()
    assert largest.elements == NS * K


def test_the_default_chunk_fits_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 5 * K * 4)
    largest = LargestResult()
    with largest:
        prototype_cross_entropy(**problem(shape(False), dtype=torch.float32))
    assert 4 * K <= largest.elements <= 5 * K


class Storages(TorchDispatchMode):
    """Every piece of memory that an operator reads or makes, without keeping it alive."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves((args, kwargs, result)):
            if torch.is_tensor(x):
                self.bytes[StorageWeakRef(x.untyped_storage())] = x.untyped_storage().nbytes()
        return result

    def alive(self) -> int:
        gc.collect()
        return sum(size for reference, size in self.bytes.items() if not reference.expired())


@pytest.mark.parametrize("output", ["features", "prototypes"])
def test_after_backward_a_fused_loss_holds_no_more_than_the_plain_one(output: str) -> None:
    """`total += loss` in a training loop must not keep features, targets or prototypes of every step."""
    held = {}
    for fused in (False, True):
        (student, teacher), loss = models(), dino_loss(fused=fused)
        loss.attach(student, teacher)
        if fused:
            for model in (student, teacher):
                model.head.output = output
        with Storages() as storages:
            value = loss(student(crops()), teacher(crops()[:10]), 0)
            before = storages.alive()
            value.backward()
        student.zero_grad()  # of the gradients that were given away the graph keeps nothing either
        _row_groups._chunks_of_pairs.cache_clear()  # which rows meet is kept once for all steps
        held[fused] = storages.alive()
        assert held[fused] < before
        del value
    assert held[True] <= held[False]


def shape(same_position: bool, p: int = P) -> tuple[int, int, int, int, int]:
    return (NT, NT, K, p, 1) if same_position else (NS, NT, K, p, M)
