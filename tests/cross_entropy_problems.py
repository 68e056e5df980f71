"""Random inputs of `prototype_cross_entropy`, and what its reference makes of them."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vmf_heads import HeadOutput
from vmf_heads.cross_entropy import prototype_cross_entropy_reference

# (student rows, teacher rows, prototypes K, dimension p, teacher rows per student row M): primes and ones on purpose
SHAPES = [(1, 1, 2, 2, 1), (7, 5, 13, 3, 2), (31, 11, 101, 17, 3), (6, 2, 5, 4, 1)]


def problem(
    shape: tuple[int, int, int, int, int],
    *,
    scales: bool = False,
    same_position: bool = False,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> dict[str, Any]:
    """Arguments with uneven norms, rows without a teacher row and zero weights; temperatures as in DINO.

    With `scales` the prototypes are directions, of any length, and have scales of either sign, the first of them 0. At
    the `same_position` there are no teacher rows: student row i is trained towards teacher row i.
    """
    ns, nt, k, p, m = shape
    options: dict[str, Any] = {"dtype": dtype, "device": device}
    weights = torch.rand(ns, m, **options)
    weights[torch.rand(ns, m) < 0.2] = 0
    return {
        "student": head_output(ns, k, p, scales=scales, requires_grad=True, **options),
        "teacher": head_output(nt, k, p, scales=scales, **options),
        "student_temperature": 0.1,
        "teacher_temperature": 0.04,
        "log_center": torch.randn(k, **options),
        "teacher_rows": None if same_position else torch.randint(-1, nt, (ns, m), device=device),
        "weights": weights,
    }


def head_output(
    rows: int, k: int, p: int, *, scales: bool = False, requires_grad: bool = False, **options: Any
) -> HeadOutput:
    """Unit features and prototypes whose tensors are leaves."""
    features = normalize(torch.randn(rows, p, **options), dim=1)
    directions = torch.randn(k, p, **options)
    lengths = None
    if scales:
        lengths = torch.randn(k, **options)
        lengths[0] = 0
    made = HeadOutput(features, directions, lengths)
    for tensor in made:
        if tensor is not None:
            tensor.requires_grad_(requires_grad)
    return made


def cast(output: HeadOutput, dtype: torch.dtype) -> HeadOutput:
    """The same numbers in another dtype, with gradients to the originals."""
    features, directions, scales = output
    return HeadOutput(features.to(dtype), directions.to(dtype), None if scales is None else scales.to(dtype))


def weight_normed(output: HeadOutput) -> HeadOutput:
    """The same prototypes without scales, with gradients to the originals."""
    return HeadOutput(output.features, output.prototypes, None)


def reference(arguments: dict[str, Any]) -> tuple[Tensor, Tensor, int]:
    """The reference's results in float64 for any arguments of the fused loss."""
    exact = {
        name: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in arguments.items()
        if name != "batch_chunk_size"
    }
    for name in ("student", "teacher"):
        exact[name] = cast(arguments[name], torch.float64)
    return prototype_cross_entropy_reference(**exact)


def learning(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """The student's tensors that carry gradients, by name."""
    named = arguments["student"]._asdict().items()
    return {name: tensor for name, tensor in named if tensor is not None and tensor.requires_grad}


def gradients(loss: Tensor, arguments: dict[str, Any], *, retain_graph: bool = False) -> dict[str, Tensor]:
    """d loss / d tensor of the student's tensors that carry gradients, by name."""
    wanted = learning(arguments)
    return dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values()), retain_graph=retain_graph), strict=True))
