"""iBOTLoss(fused=True) is iBOTLoss(fused=False) without the logits of any token, and appendix A.5 in float64."""

import copy
from typing import Any

import pytest
import torch

from devices import DEVICES
from ibot_models import BATCH, GLOBAL, HEADS, LOCAL, K, ibot_loss, models, views
from ibot_models import num_patch_prototypes as k2
from test_compat_ibot import reference_losses, step
from test_cross_entropy_memory import LargestResult
from vmf_heads.compat.ibot import iBOTLoss

SHARING = pytest.mark.parametrize("heads", HEADS)


def training(fused: bool, *, heads: str, normalizer: str = "vmf", **options: Any) -> dict[str, Any]:
    """Losses, last gradients and centres after three steps of gradient descent in float64; the same start for both."""
    torch.manual_seed(3)
    student, teacher = (m.double() for m in models(heads, normalizer=normalizer))
    loss = ibot_loss(heads, fused=fused, **options).double()
    loss.attach(student, teacher)
    result: dict[str, Any] = {}
    for epoch in range(3):
        tokens, local_tokens, masks = views()
        batch = (tokens.double(), local_tokens.double(), masks)
        result[f"losses {epoch}"], gradients = step(loss, student, teacher, batch, epoch)
        with torch.no_grad():
            for (name, parameter), gradient in zip(student.named_parameters(), gradients, strict=True):
                result[f"gradient of {name}"] = gradient
                parameter -= 0.5 * gradient
    return result | loss.state_dict()


@SHARING
@pytest.mark.parametrize(
    "options",
    [
        {"centering": "logit"},
        {"center_on": "scores", "lambda1": 0.5, "lambda2": 3.0},
        {"center_on": "responsibilities"},
        {"student_temp": 0.05, "normalizer": "none"},
    ],
    ids=str,
)
def test_fused_is_unfused(options: dict[str, Any], heads: str) -> None:
    torch.testing.assert_close(training(True, heads=heads, **options), training(False, heads=heads, **options))


@SHARING
@pytest.mark.parametrize("device", DEVICES)
def test_the_equations_in_float64(device: str, heads: str) -> None:
    """Losses, gradients and centres of float32 heads over epochs, at norms from 0.3 to 3."""
    student, teacher = (m.to(device) for m in models(heads, temperature=0.3))
    loss = ibot_loss(heads, fused=True).to(device)
    loss.attach(student, teacher)
    exact = [copy.deepcopy(m).cpu().double() for m in (student, teacher)]
    centers = [torch.zeros(n, dtype=torch.float64) for n in (K, k2(heads))]
    for epoch in range(3):
        tokens, local_tokens, masks = views()
        batch = (tokens.to(device), local_tokens.to(device), [mask.to(device) for mask in masks])
        got, gradients = step(loss, student, teacher, batch, epoch)
        want, centers = reference_losses(*exact, (tokens.double(), local_tokens.double(), masks), epoch, centers)
        expected = torch.autograd.grad(want["loss"], list(exact[0].parameters()))
        torch.testing.assert_close({k: v.cpu().double() for k, v in got.items()}, want, rtol=2e-5, atol=0)
        for gradient, exact_gradient in zip(gradients, expected, strict=True):
            assert (gradient.cpu() - exact_gradient).norm() < 1e-4 * exact_gradient.norm()
        for name, center in zip(("log_center", "log_center2"), centers, strict=True):
            torch.testing.assert_close(loss.state_dict()[name].cpu().double(), center, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("masked", ["none", "all"])
@pytest.mark.parametrize("centering", ["probability", "logit"])
def test_no_patch_or_every_patch_is_masked(centering: str, masked: str) -> None:
    """No mask at all, as on a rank that drew none: the patch loss is 0, and every parameter has a finite gradient."""
    tokens, local_tokens, masks = views()
    batch = (tokens.double(), local_tokens.double(), [torch.full_like(mask, masked == "all") for mask in masks])
    results = []
    for fused in (False, True):
        torch.manual_seed(3)
        student, teacher = (m.double() for m in models("none shared"))
        loss = ibot_loss("none shared", centering=centering, fused=fused).double()
        loss.attach(student, teacher)
        losses, gradients = step(loss, student, teacher, batch, 0)
        assert (losses["patch"] == 0) == (masked == "none")
        results.append((losses, gradients, dict(loss.state_dict())))
    torch.testing.assert_close(results[1], results[0])


def test_one_global_crop_and_one_local_crop() -> None:
    """The [CLS] objective then has a single pair; the number of global crops is not taken to be 2."""
    values = []
    for fused in (False, True):
        torch.manual_seed(3)
        student, teacher = models("both shared")
        loss = iBOTLoss(K, K, 1, 1, 0.04, 0.04, 0.04, 0.07, 1, 3, fused=fused)
        loss.attach(student, teacher)
        tokens, local_tokens, masks = (x[:BATCH] for x in views())
        values.append(loss(student(tokens), teacher(tokens), student(local_tokens)[0], masks[:1], 0))
    torch.testing.assert_close(values[1], values[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("centering", ["logit", "probability"])
def test_a_step_holds_no_logits(centering: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does anything that follows from them: nothing is larger than the features or a chunk."""
    monkeypatch.setattr("ibot_models.K", k := 64)
    chunk = 4 * k
    monkeypatch.setattr("vmf_heads._memory.CHUNK_BYTES", {"cpu": 4 * chunk})
    student, teacher = models("both shared")
    loss = ibot_loss("both shared", centering=centering, fused=True)
    loss.attach(student, teacher)
    tokens, local_tokens, masks = views(batch := 20)
    with torch.no_grad():
        of_student, of_teacher, of_local = student(tokens), teacher(tokens), student(local_tokens)[0]
    outputs = [tuple(x.requires_grad_() for x in of_student), of_teacher, of_local.requires_grad_()]
    largest = LargestResult()
    with largest:
        loss(*outputs, masks, 0)["loss"].backward()
    assert chunk < largest.elements <= of_student[1].numel()
    assert of_student[1].grad.any()
    assert largest.elements < min((GLOBAL + LOCAL) * batch, int(torch.cat(masks[:GLOBAL]).sum())) * k


def test_evaluation_leaves_no_graph() -> None:
    student, teacher = models()
    loss = ibot_loss(fused=True)
    loss.attach(student, teacher)
    tokens, local_tokens, masks = views()
    with torch.no_grad():
        losses = loss(student(tokens), teacher(tokens), student(local_tokens)[0], masks, 0)
    assert not losses["loss"].requires_grad
    assert losses["loss"] > 0


def test_what_other_code_asks_of_the_loss_is_that_of_the_unfused_one() -> None:
    """Targets, one update of the centres, and the logits and scores behind `acc` of main_ibot.py."""
    models_ = models()
    tokens = views()[0]
    results = []
    for fused in (False, True):
        student, teacher = copy.deepcopy(models_)
        loss = ibot_loss(fused=fused)
        loss.attach(student, teacher)
        of_student, of_teacher = student(tokens), teacher(tokens)
        loss.update_center(*of_teacher, epoch=1)
        (logits, of_patch), (scores, _) = loss.with_cls_logits(of_student, of_teacher)
        assert of_patch is of_student[1]
        assert not logits.requires_grad or not fused
        results.append((loss.targets(of_teacher, 2), dict(loss.state_dict()), logits.detach(), scores))
    assert results[0][2].shape == results[0][3].shape == (GLOBAL * BATCH, K)
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher_cls": lambda x: x[:, 1:]}, r"`teacher_output\[0\]` .*\(10, 7\)\) must be .*`bottleneck_dim` \(=8\)"),
        ({"student_cls": lambda x: x[1:]}, r"`student_output\[0\]` and `student_local_cls` .* = \(20, 8\) for B=5"),
        ({"student_patch": lambda x: x[..., 1:]}, r"`student_output\[1\]` .* with `bottleneck_dim` \(=8\)"),
        ({"masks": lambda x: x[:1]}, r"`student_mask` \(of shapes \[\(5, 2, 3\)\]\) must hold a mask"),
    ],
)
def test_bad_inputs_change_nothing(change: dict[str, Any], message: str) -> None:
    student, teacher = models()
    loss = ibot_loss(fused=True)
    loss.attach(student, teacher)
    tokens, local_tokens, masks = views()
    names = ("student_cls", "student_patch", "teacher_cls", "teacher_patch", "masks")
    values = dict(zip(names, (*student(tokens), *teacher(tokens), masks), strict=True))
    for name, function in change.items():
        values[name] = function(values[name])
    outputs = [(values[f"{who}_cls"], values[f"{who}_patch"]) for who in ("student", "teacher")]
    with pytest.raises(ValueError, match=message):
        loss(*outputs, student(local_tokens)[0], values["masks"], 0)
    assert not loss.centering.log_center.any()
    assert not loss.centering2.log_center.any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("float32_scores", [False, True])
def test_autocast(float32_scores: bool, device: str) -> None:
    """bfloat16 reaches no softmax: losses, gradients and centres are those of the unfused loss under autocast."""
    results = []
    for fused in (False, True):
        torch.manual_seed(3)
        student, teacher = (m.to(device) for m in models(float32_scores=float32_scores))
        loss = ibot_loss(fused=fused).to(device)
        loss.attach(student, teacher)
        tokens, local_tokens, masks = views()
        batch = (tokens.to(device), local_tokens.to(device), [mask.to(device) for mask in masks])
        with torch.autocast(device, dtype=torch.bfloat16):
            losses, gradients = step(loss, student, teacher, batch, 0)
        assert {x.dtype for x in losses.values()} == {torch.float32}
        results.append((losses, gradients, dict(loss.state_dict())))
    torch.testing.assert_close(results[1][0::2], results[0][0::2], rtol=1e-3, atol=1e-4)
    for got, want in zip(*(result[1] for result in results), strict=True):
        assert (got - want).norm() < (0.015 if float32_scores else 0.02) * want.norm()
