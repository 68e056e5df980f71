"""DINOLoss(fused=True) is DINOLoss(fused=False) without the logits."""

import copy
from typing import Any

import pytest
import torch

from dino_models import NCROPS, K, crops, dino_loss, models
from test_cross_entropy_memory import LargestResult, NewTensors

BATCH = 50


def training(fused: bool, *, steps: int = 3, frozen: tuple[str, ...] = (), **options: Any) -> dict[str, torch.Tensor]:
    """Losses, last gradients and state after some steps of gradient descent in float64; the same start for both."""
    torch.manual_seed(3)
    student, teacher = (m.double() for m in models(normalizer=options.pop("normalizer", "vmf")))
    for name in frozen:
        student.head.last_layer.get_parameter(name).requires_grad_(False)
    loss = dino_loss(fused=fused, **options).double()
    loss.attach(student, teacher)
    result = {}
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    for epoch in range(steps):
        x = crops().double()
        value = loss(student(x), teacher(x[: 2 * len(x) // NCROPS]), epoch)
        gradients = torch.autograd.grad(value, list(trained.values()))
        result[f"loss {epoch}"] = value.detach()
        with torch.no_grad():
            for (name, parameter), gradient in zip(trained.items(), gradients, strict=True):
                result[f"gradient of {name}"] = gradient
                parameter -= 0.5 * gradient
    return result | loss.state_dict()


@pytest.mark.parametrize("normalizer", ["vmf", "none"])
@pytest.mark.parametrize(
    "options",
    [{"centering": "logit"}, {"center_on": "scores"}, {"center_on": "responsibilities"}, {"student_temp": 0.05}],
    ids=str,
)
def test_fused_is_unfused(options: dict[str, Any], normalizer: str) -> None:
    unfused = training(False, normalizer=normalizer, **options)
    torch.testing.assert_close(training(True, normalizer=normalizer, **options), unfused)


@pytest.mark.filterwarnings("ignore:the student's prototype norms are frozen")
@pytest.mark.parametrize("frozen", [("weight_g",), ("weight_v",), ("weight_g", "weight_v")], ids=str)
def test_fused_is_unfused_with_frozen_prototypes(frozen: tuple[str, ...]) -> None:
    torch.testing.assert_close(training(True, frozen=frozen), training(False, frozen=frozen))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("centering", "center_on"), [("logit", "scores"), ("probability", "responsibilities")])
def test_a_float32_centre_serves_float64_heads(centering: str, center_on: str, fused: bool) -> None:
    states = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(3)
        student, teacher = (m.to(dtype) for m in models())
        loss = dino_loss(centering=centering, center_on=center_on, fused=fused)
        loss.attach(student, teacher)
        x = crops().to(dtype)
        assert loss(student(x), teacher(x[: 2 * len(x) // NCROPS]), 0).dtype == dtype
        states.append(loss.state_dict())
    torch.testing.assert_close(*states, rtol=1e-4, atol=1e-5)


def test_cancelled_gradients_of_the_last_layer() -> None:
    """What DINO does in its first epochs: the gradient is computed and thrown away, and the next step is unharmed."""
    student, teacher = models()
    loss = dino_loss(fused=True)
    loss.attach(student, teacher)
    x = crops()
    for _ in range(2):
        loss(student(x), teacher(x[: 2 * len(x) // NCROPS]), 0).backward()
        assert student.head.last_layer.weight_v.grad is not None
        student.head.last_layer.weight_g.grad = student.head.last_layer.weight_v.grad = None
        assert student.backbone.weight.grad is not None


def test_evaluation_leaves_no_graph() -> None:
    student, teacher = models()
    loss = dino_loss(fused=True)
    loss.attach(student, teacher)
    x = crops()
    with torch.no_grad():
        value = loss(student(x), teacher(x[: 2 * len(x) // NCROPS]), 0)
    assert not value.requires_grad
    assert value > 0


@pytest.mark.parametrize("centering", ["logit", "probability"])
def test_a_step_holds_no_logits(centering: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmf_heads._memory.CHUNK_BYTES", {"cpu": 4 * K * 4})
    student, teacher = models()
    loss = dino_loss(centering=centering, fused=True)
    loss.attach(student, teacher)
    x = crops(BATCH)
    features, teacher_features = student(x).detach().requires_grad_(), teacher(x[: 2 * BATCH])
    largest = LargestResult()
    with largest:
        loss(features, teacher_features, 0).backward()
    assert largest.elements == features.numel() > 4 * K
    assert largest.elements < 2 * BATCH * K  # not even the teacher's logits


@pytest.mark.parametrize("centering", ["logit", "probability"])
def test_a_step_makes_neither_prototypes_nor_their_gradient(centering: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmf_heads._memory.CACHE_BYTES", 4 * K)  # of the gradient of K * p directions
    student, teacher = models()
    loss = dino_loss(centering=centering, fused=True)
    loss.attach(student, teacher)
    x = crops()
    weight_v = student.head.last_layer.weight_v
    with NewTensors(weight_v.shape) as new:
        value = loss(student(x), teacher(x[: 2 * len(x) // NCROPS]), 0)
    value.backward()
    assert [weight_v.grad.data_ptr()] == new.addresses


@pytest.mark.parametrize("half", [None, torch.bfloat16], ids=str)
def test_targets_of_an_attached_head_are_those_of_the_unfused_loss(
    half: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmf_heads._matmul.autocast_dtype", lambda _: half)  # as under CUDA autocast
    student, teacher = models()
    x = crops()[: 2 * 5]
    targets = []
    for fused in (False, True):
        heads = copy.deepcopy(student), copy.deepcopy(teacher)
        loss = dino_loss(fused=fused)
        loss.attach(*heads)
        targets.append(loss.targets(heads[1](x), 2))
    assert targets[0].shape == (10, K)
    torch.testing.assert_close(*targets)


def cpu_autocast_dtype(_: torch.device) -> torch.dtype | None:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("call", ["targets", "update_center", "forward"])
def test_exact_heads_stay_exact_under_autocast(call: str, exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`float32_scores=True` counts for what the fused loss makes of features, too; without it autocast rounds."""
    for module in ("_matmul", "cross_entropy"):  # as on CUDA, whose autocast alone rounds operands
        monkeypatch.setattr(f"vmf_heads.{module}.autocast_dtype", cpu_autocast_dtype)
    student, teacher = models(float32_scores=exact)
    loss = dino_loss(fused=True)
    loss.attach(student, teacher)
    x = crops()
    results = []
    for enabled in (False, True):
        copied = copy.deepcopy(loss)
        copied.attach(student, teacher)
        outputs = [teacher(x[: 2 * 5])] if call != "forward" else [student(x).detach(), teacher(x[: 2 * 5])]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            result = getattr(copied, call)(*outputs, 0)
        results.append(copied.state_dict()["log_center"] if result is None else result)
    assert torch.equal(*results) is exact
