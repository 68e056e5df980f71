"""`prototype_cross_entropy` inside torch.compile, with batched gradients, and on fake tensors."""

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cross_entropy_problems import gradients, head_output, problem, reference
from test_cross_entropy import NORMALIZER, SAME_POSITION, SCALES
from test_cross_entropy_precision import dino_problem
from vmf_heads import (
    HeadOutput,
    _at_once,
    _chunked,
    _chunked_operator,
    _loss_and_gradients,
    _row_groups,
    prototype_cross_entropy,
)
from vmf_heads.cross_entropy import prototype_cross_entropy_reference

TEMPERATURES = {"student_temperature": 0.1, "teacher_temperature": 0.05}


pytestmark = pytest.mark.filterwarnings(  # the tracer itself does so
    "ignore:.*should not be instantiated:DeprecationWarning"
)

# The ways to the loss under torch.compile, and rows in a chunk that lead there; the last one is a GPU's.
WAYS = {"at once": 64, "an operator": 12, "traced": 12}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the other ways raise."""

    def closed(*_: Any) -> Any:
        raise AssertionError("another way was taken")

    starts = {
        "at once": (_at_once, "_logits"),
        "an operator": (_chunked, "chunked_operator"),
        "traced": (_chunked, "loss_and_gradients"),
    }
    for name, (module, function) in starts.items():
        if name != request.param:
            monkeypatch.setattr(module, function, closed)
    if request.param == "traced":
        monkeypatch.setattr(_chunked, "is_an_operator", lambda *_: False)
    torch._dynamo.reset()
    found: str = request.param
    return found


@NORMALIZER
@SAME_POSITION
@SCALES
def test_compiles_without_a_graph_break(scales: bool, same_position: bool, normalizer: str, way: str) -> None:
    """Into chunks, where there are some: two of teacher rows, and two of rows at the same position."""
    arguments = problem((7, 7, 13, 3, 2), scales=scales, same_position=same_position)
    if same_position:
        arguments["weights"] = arguments["weights"][:, :1]
    arguments |= {"normalizer": normalizer, "batch_chunk_size": WAYS[way]}

    def loss(student: HeadOutput) -> tuple[torch.Tensor, torch.Tensor]:
        return prototype_cross_entropy(**arguments | {"student": student})[:2]

    value, log_sum = torch.compile(loss, fullgraph=True, backend="aot_eager")(arguments["student"])
    assert not log_sum.requires_grad
    expected, expected_log_sum, _ = reference(arguments)
    torch.testing.assert_close((value, log_sum), (expected, expected_log_sum))
    torch.testing.assert_close(gradients(3 * value, arguments, retain_graph=True), gradients(3 * expected, arguments))
    torch.testing.assert_close(gradients(value, arguments), gradients(reference(arguments)[0], arguments))


def test_compiled_with_pairs_that_occur_twice_and_no_weights(way: str) -> None:
    arguments = problem((7, 7, 13, 3, 3), scales=True) | {"weights": None, "batch_chunk_size": WAYS[way]}
    arguments["teacher_rows"][:, 1] = arguments["teacher_rows"][:, 0]
    arguments["student"].directions.requires_grad_(False)

    def loss(student: HeadOutput) -> torch.Tensor:
        return prototype_cross_entropy(**arguments | {"student": student})[0]

    value = torch.compile(loss, fullgraph=True, backend="aot_eager")(arguments["student"])
    expected, _, _ = reference(arguments)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradients(value, arguments), gradients(expected, arguments))


def test_compiled_in_the_contexts_of_a_training_loop(way: str) -> None:
    """The backward pass is traced under the autocast that is on around the call. Directions may be a transpose."""
    arguments = problem((7, 7, 37, 16, 2), dtype=torch.float32) | {"batch_chunk_size": WAYS[way]}
    features, directions, _ = arguments["student"]
    arguments["student"] = HeadOutput(features, directions.detach().t().contiguous().t().requires_grad_(), None)

    def loss(student: HeadOutput) -> torch.Tensor:
        return prototype_cross_entropy(**arguments | {"student": student})[0]

    # Within a default device torch 2.8 traces no Tensor.split, which chunks need.
    device = nullcontext() if way == "traced" else torch.device("cpu")
    with torch.autocast("cpu", torch.bfloat16), device:
        value = torch.compile(loss, fullgraph=True, backend="aot_eager")(arguments["student"])
    expected, _, _ = reference(arguments)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients(value, arguments), gradients(expected, arguments), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # the tracer's, where it goes on after a break
def test_compiled_with_a_temperature_that_no_operator_takes() -> None:
    """The tracer makes a tensor of NumPy's numbers."""
    arguments = problem((7, 7, 13, 3, 1), scales=True, same_position=True)
    arguments |= {"batch_chunk_size": WAYS["an operator"], "normalizer": "none"}

    def loss(student: HeadOutput, temperature: Any) -> torch.Tensor:
        return prototype_cross_entropy(**arguments | {"student": student, "teacher_temperature": temperature})[0]

    torch._dynamo.reset()
    value = torch.compile(loss, backend="aot_eager")(arguments["student"], np.float64(0.05))
    torch.testing.assert_close(value, reference(arguments | {"teacher_temperature": 0.05})[0])


def test_compiled_once_for_batches_of_any_size(way: str) -> None:
    arguments = problem((7, 7, 13, 3, 2), scales=True) | {"batch_chunk_size": WAYS[way]}

    def loss(student: HeadOutput, teacher: HeadOutput, teacher_rows: torch.Tensor) -> torch.Tensor:
        own = {"student": student, "teacher": teacher, "teacher_rows": teacher_rows, "weights": None}
        return prototype_cross_entropy(**arguments | own)[0]

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (7, 8, 11):
        own = problem((rows, rows, 13, 3, 2), scales=True)
        value = compiled(own["student"], own["teacher"], own["teacher_rows"])
        expected, _, _ = reference(own | {"log_center": arguments["log_center"], "weights": None})
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(gradients(value, own), gradients(expected, own))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own, in what checks its operators
def test_the_operator_keeps_the_rules_of_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its schema, the shapes of its results without numbers, and what it does to its arguments, which is nothing."""
    called: list[tuple[Any, ...]] = []
    operator = _chunked_operator._operator
    monkeypatch.setattr(_chunked_operator, "_operator", lambda *a: called.append(a) or operator(*a))
    monkeypatch.setattr(_chunked, "is_an_operator", lambda *_: True)
    for scales in (False, True):
        prototype_cross_entropy(**problem((7, 7, 13, 3, 2), scales=scales))
        *passed, _ = (x.detach() if torch.is_tensor(x) else x for x in called[-1])
        for wanted in ([True, True, scales], [False, True, False], [False, False, False]):
            torch.library.opcheck(operator, (*passed, wanted))


def test_compiled_crops_are_worked_on_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator reads the pairs, which a tracer cannot."""
    monkeypatch.setattr(_row_groups, "LEAST_DIM", 1)
    seen: list[int] = []
    together = _loss_and_gradients.groups_together
    monkeypatch.setattr(
        _loss_and_gradients, "groups_together", lambda y, *rest: seen.append(len(y)) or together(y, *rest)
    )
    arguments = dino_problem(1.0, k=257, images=2) | {"batch_chunk_size": 16}

    def loss(student: HeadOutput) -> torch.Tensor:
        return prototype_cross_entropy(**arguments | {"student": student})[0]

    torch._dynamo.reset()
    value = torch.compile(loss, fullgraph=True, backend="aot_eager")(arguments["student"])
    torch.testing.assert_close(value.double(), reference(arguments)[0], rtol=1e-5, atol=1e-6)
    assert seen == [len(arguments["student"].features)]


@pytest.mark.slow  # builds kernels
@SAME_POSITION
def test_compiled_kernels_equal_the_reference(same_position: bool, way: str) -> None:
    """Inductor's own code for the elementwise work: torch 2.13 had a fault there, which `_logits` avoids.

    In one chunk and without log C_p, whose compilation has tests of its own: every chunk is unrolled into the graph.
    """
    arguments = problem((7, 7, 37, 5, 1), scales=True, same_position=same_position) | {"normalizer": "none"}
    arguments["batch_chunk_size"] = {"at once": 64, "an operator": 27, "traced": 27}[way]

    def loss(student: HeadOutput) -> tuple[torch.Tensor, torch.Tensor]:
        return prototype_cross_entropy(**arguments | {"student": student})[:2]

    value, log_sum = torch.compile(loss, fullgraph=True)(arguments["student"])
    expected, expected_log_sum, _ = reference(arguments)
    torch.testing.assert_close((value, log_sum), (expected, expected_log_sum))
    torch.testing.assert_close(gradients(3 * value, arguments), gradients(3 * expected, arguments))


@pytest.mark.slow  # builds kernels
def test_compiled_kernels_are_as_exact_as_the_plain_loss() -> None:
    """In float32, over so many prototypes that sums of them, one by one, lose digits."""
    arguments = problem((24, 8, 20_001, 16, 2), scales=True, dtype=torch.float32)

    def loss(student: HeadOutput) -> tuple[torch.Tensor, torch.Tensor]:
        return prototype_cross_entropy(**arguments | {"student": student})[:2]

    def errors(value: torch.Tensor, log_sum: torch.Tensor) -> list[float]:
        results = {"loss": value.detach(), "log_sum": log_sum} | gradients(value, arguments)
        return [float((results[n].double() - exact[n]).norm() / exact[n].norm()) for n in exact]

    value, log_sum, _ = reference(arguments)
    exact = {"loss": value.detach(), "log_sum": log_sum} | gradients(value, arguments)
    torch._dynamo.reset()
    compiled = errors(*torch.compile(loss, fullgraph=True)(arguments["student"]))
    plain = errors(*prototype_cross_entropy_reference(**arguments)[:2])
    assert all(ours <= 1.25 * theirs + 1e-7 for ours, theirs in zip(compiled, plain, strict=True)), (compiled, plain)


@SCALES
def test_batched_gradients(scales: bool) -> None:
    student, teacher = (head_output(6, 9, 8, scales=scales, requires_grad=True) for _ in "st")
    leaves = [tensor for tensor in student if tensor is not None]

    def loss() -> torch.Tensor:
        return prototype_cross_entropy(student, teacher, **TEMPERATURES)[0]

    single = torch.autograd.grad(loss(), leaves)
    batched = torch.autograd.grad(loss(), leaves, torch.tensor([1.0, 2.0]), is_grads_batched=True)
    torch.testing.assert_close(batched, tuple(torch.stack([one, 2 * one]) for one in single))


@SCALES
def test_fake_tensors(scales: bool) -> None:
    """They have shapes and no numbers: what a tool that plans memory or shards a model runs."""
    with FakeTensorMode():
        student, teacher = (head_output(6, 9, 8, scales=scales, requires_grad=True) for _ in "st")
        loss, log_sum, rows = prototype_cross_entropy(student, teacher, **TEMPERATURES)
        loss.backward()
    assert (loss.shape, log_sum.shape, rows) == ((), (9,), 6)
    assert student.directions.grad.shape == (9, 8)
