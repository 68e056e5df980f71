"""`prototype_cross_entropy` inside torch.compile, with batched gradients, and on fake tensors."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cross_entropy_problems import gradients, head_output, problem, reference
from test_cross_entropy import SAME_POSITION, SCALES
from vmf_heads import HeadOutput, prototype_cross_entropy

TEMPERATURES = {"student_temperature": 0.1, "teacher_temperature": 0.05}


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # the tracer itself does so
@pytest.mark.parametrize(("same_position", "scales"), [(False, True), (True, False)])
def test_compiles_without_a_graph_break(same_position: bool, scales: bool) -> None:
    arguments = problem((7, 7, 13, 3, 1), scales=scales, same_position=same_position)
    arguments["batch_chunk_size"] = 12  # two chunks of teacher rows, and of rows at the same position

    def loss(student: HeadOutput) -> torch.Tensor:
        return prototype_cross_entropy(**arguments | {"student": student})[0]

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(arguments["student"])
    expected = reference(arguments)[0]
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(gradients(3 * compiled, arguments), gradients(3 * expected, arguments))


@pytest.mark.slow  # builds kernels
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@SAME_POSITION
def test_compiled_kernels_equal_the_reference(same_position: bool) -> None:
    """Inductor's own code for the elementwise work: torch 2.13 had a fault there, which `_logits` avoids.

    In one chunk and without log C_p, whose compilation has tests of its own: every chunk is unrolled into the graph.
    """
    arguments = problem((7, 7, 37, 5, 1), scales=True, same_position=same_position) | {"normalizer": "none"}

    def loss(student: HeadOutput) -> tuple[torch.Tensor, torch.Tensor]:
        return prototype_cross_entropy(**arguments | {"student": student})[:2]

    torch._dynamo.reset()
    value, log_sum = torch.compile(loss, fullgraph=True)(arguments["student"])
    expected, expected_log_sum, _ = reference(arguments)
    torch.testing.assert_close((value, log_sum), (expected, expected_log_sum))
    torch.testing.assert_close(gradients(3 * value, arguments), gradients(3 * expected, arguments))


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
