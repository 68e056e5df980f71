"""Rounding: the fused loss is as exact as the plain one in the same dtype, both measured against float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from cross_entropy_problems import GRADIENTS, SHAPES, gradients, problem, reference
from devices import DEVICES
from vmf_heads import prototype_cross_entropy
from vmf_heads._chunked import ChunkedCrossEntropy, Distillation
from vmf_heads._epilogues import PLAIN
from vmf_heads._prototypes import _HalfScores
from vmf_heads.cross_entropy import dino_pairs, prototype_cross_entropy_reference

HALF = [torch.bfloat16, torch.float16]


def dino_problem(norm: float, device: str = "cpu", *, k: int = 4096, images: int = 16) -> dict[str, Any]:
    """6 crops in float32; prototypes of about `norm`."""
    arguments = problem((6 * images, 2 * images, k, 64, 2), dtype=torch.float32, device=device)
    with torch.no_grad():
        for name in ("student_prototypes", "teacher_prototypes"):
            arguments[name].mul_(norm / 8)
    targets, weights = dino_pairs(images, 6, device=device)
    return arguments | {"targets": targets, "weights": weights.float()}


def results(loss: Tensor, arguments: dict[str, Any], *, scale: float = 1.0) -> dict[str, Tensor]:
    scaled = {name: gradient / scale for name, gradient in gradients(scale * loss, arguments).items()}
    return {"loss": loss.detach()} | scaled


def errors(got: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Relative, in the Euclidean norm."""
    return {name: float((got[name].double() - exact[name]).norm() / exact[name].norm()) for name in exact}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("norm", [0.3, 1.0, 5.0])
def test_float32_is_as_exact_as_the_plain_loss(norm: float, device: str) -> None:
    arguments = dino_problem(norm, device)
    exact = results(reference(arguments)[0], arguments)
    fused = errors(results(prototype_cross_entropy(**arguments)[0], arguments), exact)
    plain = errors(results(prototype_cross_entropy_reference(**arguments)[0], arguments), exact)
    eps = torch.finfo(torch.float32).eps
    for name in exact:
        assert fused[name] <= plain[name] + 2 * eps, (fused, plain)


@pytest.mark.parametrize("dtype", [None, *HALF], ids=str)
def test_scales_are_as_exact_as_the_prototypes_they_make(dtype: torch.dtype | None) -> None:
    """Against the loss of w = weight_norm(v, scale), in float32 or in half-precision products, of uneven norms."""
    made = dino_problem(1.0)
    v, scale = torch.randn_like(made["student_prototypes"]), torch.rand(4096).mul(3).requires_grad_()
    scaled = made | {"student_prototypes": v.requires_grad_(), "student_scale": scale}
    scaled |= {"teacher_prototypes": made["teacher_prototypes"] * 5, "teacher_scale": torch.rand(4096) * 3}
    made |= {
        f"{whose}_prototypes": torch._weight_norm(scaled[f"{whose}_prototypes"], scaled[f"{whose}_scale"][:, None], 0)
        for whose in ("student", "teacher")
    }
    exact = results(reference(scaled)[0], scaled)
    got = errors(results(with_half_precision_products(scaled, dtype), scaled), exact)
    want = errors(results(with_half_precision_products(made, dtype), scaled), exact)
    eps = torch.finfo(torch.float32).eps
    for name in exact:
        assert got[name] <= want[name] * 1.05 + 2 * eps, (got, want)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(
    ("norm", "k", "images"), [(1.0, 4096, 16), (5.0, 4096, 16), pytest.param(0.2, 65536, 4, id="small probabilities")]
)
def test_half_precision_products_are_as_exact_as_those_of_the_plain_loss(
    norm: float, k: int, images: int, dtype: torch.dtype
) -> None:
    arguments = dino_problem(norm, k=k, images=images)
    exact = results(reference(arguments)[0], arguments)
    fused = errors(results(with_half_precision_products(arguments, dtype), arguments), exact)
    # The plain loss gets the help of a GradScaler, without which small gradients would vanish in float16.
    plain = errors(results(plain_with_half_precision_products(arguments, dtype), arguments, scale=2.0**14), exact)
    for name in exact:
        assert fused[name] <= plain[name] * 1.05 + 1e-6, (fused, plain)


def with_half_precision_products(arguments: dict[str, Any], dtype: torch.dtype | None) -> Tensor:
    """The fused loss as under CUDA autocast to `dtype`, on any device."""
    distillation = Distillation(
        teacher_features=arguments["teacher_features"],
        teacher_prototypes=arguments["teacher_prototypes"],
        teacher_scale=arguments.get("teacher_scale"),
        statistics_bias=None,
        target_bias=arguments["teacher_log_normalizer"] - arguments["log_center"],
        student_temperature=arguments["student_temperature"],
        teacher_temperature=arguments["teacher_temperature"],
        targets=arguments["targets"],
        weights=arguments["weights"],
        per_row=False,
        chunk_rows=None,
        product_dtype=dtype,
        epilogues=PLAIN,
    )
    y, w, b = (arguments[name] for name in GRADIENTS)
    wanted = (True, True, "student_scale" in arguments, True)
    return ChunkedCrossEntropy.apply(y, w, arguments.get("student_scale"), b, distillation, wanted)[0]


def plain_with_half_precision_products(arguments: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """The unfused loss with the scores that a head returns under CUDA autocast."""
    y, w, b = (arguments[name] for name in GRADIENTS)
    log_p = (_HalfScores.apply(y, w, dtype) / arguments["student_temperature"] + b).log_softmax(1)
    raw = _HalfScores.apply(arguments["teacher_features"], arguments["teacher_prototypes"], dtype)
    bias = arguments["teacher_log_normalizer"] - arguments["log_center"]
    teacher = (raw / arguments["teacher_temperature"] + bias).softmax(1)
    pairs = zip(arguments["targets"].T, arguments["weights"].T, strict=True)
    return sum(-(weight * (target >= 0) * (teacher[target] * log_p).sum(1)).sum() for target, weight in pairs)


def test_autocast_on_the_cpu_changes_nothing() -> None:
    arguments = problem(SHAPES[2], dtype=torch.float32)
    plain = results(prototype_cross_entropy(**arguments)[0], arguments)
    with torch.autocast("cpu", torch.bfloat16):
        loss, log_sum, _ = prototype_cross_entropy(**arguments)
    assert loss.dtype == log_sum.dtype == torch.float32
    torch.testing.assert_close(results(loss, arguments), plain, rtol=0, atol=0)


@pytest.mark.skipif("cuda" not in DEVICES, reason="needs a GPU: only there does autocast round the operands")
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_autocast_on_cuda_rounds_the_operands_only(dtype: torch.dtype) -> None:
    arguments = dino_problem(1.0, "cuda")
    exact = results(reference(arguments)[0], arguments)
    with torch.autocast("cuda", dtype):
        loss, log_sum, _ = prototype_cross_entropy(**arguments)
    assert loss.dtype == log_sum.dtype == torch.float32
    assert max(errors(results(loss, arguments), exact).values()) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_inputs_are_computed_in_float32(dtype: torch.dtype) -> None:
    arguments = {
        name: value.detach().to(dtype).requires_grad_(value.requires_grad)
        if torch.is_tensor(value) and value.is_floating_point()
        else value
        for name, value in problem(SHAPES[2], dtype=torch.float32).items()
    }
    loss, log_sum, _ = prototype_cross_entropy(**arguments)
    assert loss.dtype == log_sum.dtype == torch.float32
    torch.testing.assert_close(loss.double(), reference(arguments)[0], rtol=1e-5, atol=1e-6)
    assert {gradient.dtype for gradient in gradients(loss, arguments).values()} == {dtype}
