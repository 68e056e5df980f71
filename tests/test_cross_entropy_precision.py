"""Rounding: the fused loss is as exact as the plain one in the same dtype, both measured against float64."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from cross_entropy_problems import SHAPES, cast, gradients, learning, problem, reference, weight_normed
from devices import DEVICES
from vmf_heads import HeadOutput, _row_groups, prototype_cross_entropy
from vmf_heads.centering import teacher_targets
from vmf_heads.cross_entropy import dino_pairs, prototype_cross_entropy_reference
from vmf_heads.prototypes import prototype_log_normalizer

HALF = [torch.bfloat16, torch.float16]
# How much larger the error may be than the plain loss's. In float32 nearly all of it is the rounding of the logits,
# which are <w, y / tau> here and <w, y> / tau there. In half precision predictions and targets are rounded, not the
# difference.
FLOAT32_MARGIN, HALF_MARGIN = 1.5, 1.25


def dino_problem(norm: float, device: str = "cpu", *, k: int = 4096, images: int = 16) -> dict[str, Any]:
    """6 crops in float32; prototypes of about `norm`."""
    arguments = problem((6 * images, 2 * images, k, 64, 2), dtype=torch.float32, device=device)
    with torch.no_grad():
        for name in ("student", "teacher"):
            arguments[name].directions.mul_(norm / 8)
    teacher_rows, weights = dino_pairs(images, 6, device=device)
    return arguments | {"teacher_rows": teacher_rows, "weights": weights.float()}


def confident_problem(noise: float) -> dict[str, Any]:
    """Every crop of an image lies near the same prototype, of norm 2, for student and teacher; the noise as long."""
    arguments = dino_problem(2.0)
    directions = torch.nn.functional.normalize(arguments["student"].directions.detach(), dim=1)
    for name in ("student", "teacher"):
        features = arguments[name].features
        with torch.no_grad():
            nearest = directions[37 * (torch.arange(len(features)) % 16)]
            features.copy_(torch.nn.functional.normalize(nearest + noise * features, dim=1))
            arguments[name].directions.copy_(2 * directions)
    return arguments


def results(loss: Tensor, arguments: dict[str, Any], *, scale: float = 1.0) -> dict[str, Tensor]:
    scaled = {name: gradient / scale for name, gradient in gradients(scale * loss, arguments).items()}
    return {"loss": loss.detach()} | scaled


def errors(got: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Relative, in the Euclidean norm."""
    return {name: float((got[name].double() - exact[name]).norm() / exact[name].norm()) for name in exact}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("norm", [0.3, 1.0, 5.0])
@pytest.mark.parametrize("rows", ["together", "apart"])
def test_float32_is_as_exact_as_the_plain_loss(
    rows: str, norm: float, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_row_groups, "LEAST_DIM", 1 if rows == "together" else 1000)
    arguments = dino_problem(norm, device)
    exact = results(reference(arguments)[0], arguments)
    fused = errors(results(prototype_cross_entropy(**arguments)[0], arguments), exact)
    plain = errors(results(prototype_cross_entropy_reference(**arguments)[0], arguments), exact)
    eps = torch.finfo(torch.float32).eps
    for name in exact:
        assert fused[name] <= plain[name] * FLOAT32_MARGIN + 2 * eps, (fused, plain)


@contextmanager
def products_in(dtype: torch.dtype | None) -> Iterator[None]:
    """The products of losses and heads as under CUDA autocast to `dtype`, on any device."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("_matmul", "cross_entropy"):
            patch.setattr(f"vmf_heads.{module}.autocast_dtype", lambda device: dtype)
        yield


@pytest.mark.parametrize("dtype", [None, *HALF], ids=str)
def test_scales_are_as_exact_as_the_prototypes_they_make(dtype: torch.dtype | None) -> None:
    """Against the loss of w = weight_norm(v, scale), in float32 or in half-precision products, of uneven norms."""
    scaled = dino_problem(1.0)
    student, teacher = scaled["student"], scaled["teacher"]
    scales = torch.rand(4096).mul(3).requires_grad_()
    scaled |= {
        "student": HeadOutput(student.features, torch.randn_like(student.directions).requires_grad_(), scales),
        "teacher": HeadOutput(teacher.features, teacher.directions * 5, torch.rand(4096) * 3),
    }
    made = scaled | {name: weight_normed(scaled[name]) for name in ("student", "teacher")}
    exact = results(reference(scaled)[0], scaled)
    with products_in(dtype):
        got = errors(results(prototype_cross_entropy(**scaled)[0], scaled), exact)
        want = errors(results(prototype_cross_entropy(**made)[0], scaled), exact)
    eps = torch.finfo(torch.float32).eps
    for name in exact:
        assert got[name] <= want[name] * (FLOAT32_MARGIN if dtype is None else 1.05) + 2 * eps, (got, want)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(
    ("norm", "k", "images"), [(1.0, 4096, 16), (5.0, 4096, 16), pytest.param(0.2, 65536, 4, id="small probabilities")]
)
def test_half_precision_products_are_as_exact_as_those_of_the_plain_loss(
    norm: float, k: int, images: int, dtype: torch.dtype
) -> None:
    arguments = dino_problem(norm, k=k, images=images)
    exact = results(reference(arguments)[0], arguments)
    with products_in(dtype):
        fused = errors(results(prototype_cross_entropy(**arguments)[0], arguments), exact)
        # The plain loss gets the help of a GradScaler, without which small gradients would vanish in float16.
        plain = errors(results(loss_of_scores(arguments), arguments, scale=2.0**14), exact)
    assert fused["features"] > 4 * torch.finfo(torch.float32).eps  # the products are rounded
    for name in ("features", "directions"):
        assert fused[name] <= plain[name] * HALF_MARGIN + 1e-6, (fused, plain)
    # The errors of the loss, a sum over all rows, largely cancel, and how far they do is luck.
    assert fused["loss"] <= max(plain["loss"], torch.finfo(dtype).eps / 32), (fused, plain)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(("noise", "about"), [(0.3, 0.001), (0.8, 0.01), (1.2, 0.3)])
def test_confident_predictions_in_half_precision(noise: float, about: float, dtype: torch.dtype) -> None:
    """P and T are rounded apart, and nearly the same: what is left of them must be as exact as in the plain loss."""
    arguments = confident_problem(noise)
    exact = results(reference(arguments)[0], arguments)
    assert about / 3 < exact["loss"] < 3 * about
    with products_in(dtype):
        fused = errors(results(prototype_cross_entropy(**arguments)[0], arguments), exact)
        plain = errors(results(loss_of_scores(arguments), arguments, scale=2.0**14), exact)
    for name in ("features", "directions"):
        assert fused[name] <= plain[name] * HALF_MARGIN + 1e-6, (fused, plain)
    assert fused["loss"] <= max(plain["loss"], torch.finfo(dtype).eps), (fused, plain)


def loss_of_scores(arguments: dict[str, Any]) -> Tensor:
    """The unfused loss with the scores that a head returns under CUDA autocast."""
    student, teacher = arguments["student"], arguments["teacher"]
    tau, teacher_tau = arguments["student_temperature"], arguments["teacher_temperature"]
    dim = student.directions.shape[1]
    log_p = (student.scores() / tau + prototype_log_normalizer(student.norms, dim, tau)).log_softmax(1)
    log_c = prototype_log_normalizer(teacher.norms, dim, teacher_tau)
    targets = teacher_targets(teacher.scores(), teacher_tau, log_normalizer=log_c, log_center=arguments["log_center"])
    pairs = zip(arguments["teacher_rows"].T, arguments["weights"].T, strict=True)
    return sum(-(weight * (row >= 0) * (targets[row] * log_p).sum(1)).sum() for row, weight in pairs)


def test_autocast_on_the_cpu_changes_nothing() -> None:
    arguments = problem(SHAPES[2], dtype=torch.float32)
    plain = results(prototype_cross_entropy(**arguments)[0], arguments)
    with torch.autocast("cpu", torch.bfloat16):
        loss, log_sum, _ = prototype_cross_entropy(**arguments)
        under_autocast = results(loss, arguments)
    assert loss.dtype == log_sum.dtype == torch.float32
    torch.testing.assert_close(under_autocast, plain, rtol=0, atol=0)


@pytest.mark.skipif("cuda" not in DEVICES, reason="needs a GPU: only there does autocast round the operands")
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_autocast_on_cuda_rounds_the_operands_only(dtype: torch.dtype) -> None:
    arguments = dino_problem(1.0, "cuda")
    exact = results(reference(arguments)[0], arguments)
    with torch.autocast("cuda", dtype):
        loss, log_sum, _ = prototype_cross_entropy(**arguments)
    assert loss.dtype == log_sum.dtype == torch.float32
    assert max(errors(results(loss, arguments), exact).values()) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("scales", [False, True])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_inputs_are_computed_in_float32(dtype: torch.dtype, scales: bool) -> None:
    arguments = problem(SHAPES[2], scales=scales, dtype=torch.float32)
    for name in ("student", "teacher"):
        halves = cast(arguments[name], dtype)
        arguments[name] = HeadOutput(*(None if x is None else x.detach() for x in halves))
    for tensor in arguments["student"]:
        if tensor is not None:
            tensor.requires_grad_()
    loss, log_sum, _ = prototype_cross_entropy(**arguments)
    assert loss.dtype == log_sum.dtype == torch.float32
    torch.testing.assert_close(loss.double(), reference(arguments)[0], rtol=1e-5, atol=1e-6)
    got = gradients(loss, arguments)
    assert len(got) == len(learning(arguments)) == 2 + scales
    assert {gradient.dtype for gradient in got.values()} == {dtype}
