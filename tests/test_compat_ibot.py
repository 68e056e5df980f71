"""compat.ibot: iBOT's own head and loss at prototype norm 1, appendix A.5 in float64 elsewhere, with every sharing."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from ibot_models import BATCH, CLS_TEMPS, GLOBAL, HEADS, LOCAL, PATCH_TEMPS, K, P, ibot_loss, models, views
from ibot_models import num_patch_prototypes as k2
from ibot_original import OriginaliBOTHead, OriginaliBOTLoss
from upstream import equations
from vmf_heads.compat.ibot import iBOTLoss

SHARING = pytest.mark.parametrize("heads", HEADS)


def step(loss, student, teacher, batch, epoch: int) -> tuple[dict[str, Tensor], list[Tensor]]:
    """(losses, gradients) of one step."""
    tokens, local_tokens, masks = batch
    losses = loss(student(tokens), teacher(tokens), student(local_tokens)[0], masks, epoch)
    parameters = [p for p in student.parameters() if p.requires_grad]
    return {k: v.detach() for k, v in losses.items()}, list(torch.autograd.grad(losses["loss"], parameters))


def original_model(model, heads: str, shared: bool) -> nn.Module:
    original = copy.deepcopy(model)
    original.head = OriginaliBOTHead(16, K, k2(heads), shared_head=shared, hidden_dim=12, bottleneck_dim=P)
    original.head.load_state_dict(model.head.state_dict(), strict=True)
    return original


@SHARING
@pytest.mark.parametrize("normalizer", ["vmf", "none"])
def test_at_norm_one_with_logit_centring_it_is_ibots_loss(normalizer, heads):
    student, teacher = models(heads, norms=False, normalizer=normalizer)
    originals = [original_model(m, heads, s) for m, s in zip((student, teacher), HEADS[heads], strict=True)]
    for layer in (student.head.last_layer, student.head.last_layer2):
        layer.weight_g.requires_grad = False
    with pytest.warns(UserWarning, match="norms are frozen") if normalizer == "vmf" else nullcontext():
        (loss := ibot_loss(heads, centering="logit")).attach(student, teacher)
    original_loss = OriginaliBOTLoss(K, k2(heads), GLOBAL, LOCAL, CLS_TEMPS, PATCH_TEMPS)
    for epoch in range(3):
        batch = views()
        got, want = step(loss, student, teacher, batch, epoch), step(original_loss, *originals, batch, epoch)
        torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got[1], want[1], rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(loss.center, original_loss.cls_loss.center, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(loss.center2, original_loss.center2, rtol=1e-5, atol=1e-7)


def features(model, tokens: Tensor) -> Tensor:
    return nn.functional.normalize(model.head.mlp(model.backbone(tokens)), dim=-1)


def reference_losses(
    student, teacher, batch, epoch: int, centers: list[Tensor]
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Both objectives from Eq. 6 and 7, masked token by masked token, and the centres of Eq. 9."""
    tokens, local_tokens, masks = batch
    of_teacher, of_student, of_local = (
        features(teacher, tokens),
        features(student, tokens),
        features(student, local_tokens),
    )
    layers, temps = (teacher.head.last_layer, teacher.head.last_layer2), (CLS_TEMPS[epoch], PATCH_TEMPS[epoch])
    parts = (of_teacher[:, 0], of_teacher[:, 1:])
    targets = [equations.teacher(*args) for args in zip(parts, layers, temps, centers, strict=True)]
    log_cls = equations.log_student(torch.cat([of_student[:, 0], of_local[:, 0]]), student.head.last_layer, 0.1)
    cls = equations.pairs_of_views(targets[0].chunk(GLOBAL), log_cls.chunk(GLOBAL + LOCAL))
    log_patch = equations.log_student(of_student[:, 1:], student.head.last_layer2, 0.1)
    patch = torch.zeros((), dtype=torch.float64)
    for image, mask in enumerate(torch.cat(masks[:GLOBAL]).flatten(1)):
        masked = mask.nonzero().flatten().tolist()
        for token in masked:
            patch = patch - (targets[1][image, token] * log_patch[image, token]).sum() / len(masked) / len(tokens)
    args = zip(parts, layers, temps, centers, strict=True)
    return {"cls": cls, "patch": patch, "loss": cls + patch}, [equations.next_center(*a) for a in args]


@SHARING
def test_the_equations_in_float64(heads):
    """Losses, gradients and centres over epochs; a shared teacher serves its two temperatures from one set of norms."""
    student, teacher = models(heads, temperature=0.3)
    loss = ibot_loss(heads)
    loss.attach(student, teacher)
    teacher.head.temperature = 123.0  # plays no part
    exact = [copy.deepcopy(m).double() for m in (student, teacher)]
    centers = [torch.zeros(n, dtype=torch.float64) for n in (K, k2(heads))]
    for epoch in range(3):
        tokens, local_tokens, masks = views()
        got, gradients = step(loss, student, teacher, (tokens, local_tokens, masks), epoch)
        batch = (tokens.double(), local_tokens.double(), masks)
        want, centers = reference_losses(*exact, batch, epoch, centers)
        expected = torch.autograd.grad(want["loss"], list(exact[0].parameters()))
        torch.testing.assert_close({k: v.double() for k, v in got.items()}, want, rtol=2e-5, atol=0)
        for gradient, exact_gradient in zip(gradients, expected, strict=True):
            assert (gradient - exact_gradient).norm() < 1e-4 * exact_gradient.norm()
        for name, center in zip(("log_center", "log_center2"), centers, strict=True):
            torch.testing.assert_close(loss.state_dict()[name].double(), center, rtol=1e-4, atol=1e-5)


def test_weights_of_the_objectives():
    student, teacher = models()
    batch = views()
    results = []
    for weights in ({}, {"lambda1": 0.5, "lambda2": 3.0}):
        loss = ibot_loss(**weights)
        loss.attach(student, teacher)
        results.append(step(loss, student, teacher, batch, 0)[0])
    want = {"cls": 0.5 * results[0]["cls"], "patch": 3 * results[0]["patch"]}
    torch.testing.assert_close(results[1], want | {"loss": want["cls"] + want["patch"]})


def test_masked_patches_begin_at_their_own_epoch():
    """As in iBOT: the patches' warm-up starts at `mim_start_epoch`, and before it has the first temperature."""
    loss = iBOTLoss(K, K, 2, 0, 0.04, 0.05, 0.04, 0.07, 2, 6, mim_start_epoch=3)
    assert loss.teacher_temp_schedule.tolist() == pytest.approx([0.04, 0.05, 0.05, 0.05, 0.05, 0.05])
    assert loss.teacher_temp2_schedule.tolist() == pytest.approx([0.04, 0.04, 0.04, 0.04, 0.07, 0.07])


def test_without_local_crops():
    student, teacher = models()
    loss = iBOTLoss(K, K, 2, 0, 0.04, 0.04, 0.04, 0.07, 1, 3)
    loss.attach(student, teacher)
    tokens, _, masks = views()
    losses = loss(student(tokens), teacher(tokens), None, masks[:2], 0)
    assert losses["loss"].isfinite()
    exact = [copy.deepcopy(m).double() for m in (student, teacher)]
    of_teacher, of_student = (features(m, tokens.double())[:, 0] for m in exact[::-1])
    target = equations.teacher(of_teacher, exact[1].head.last_layer, 0.04, torch.zeros(K))
    log_p = equations.log_student(of_student, exact[0].head.last_layer, 0.1)
    want = equations.pairs_of_views(target.chunk(2), log_p.chunk(2))
    torch.testing.assert_close(losses["cls"].double(), want, rtol=2e-5, atol=0)


def test_the_two_temperatures_of_a_shared_teacher():
    """One set of prototypes, kappa = norm / temperature twice: the targets differ by more than the temperature."""
    student, teacher = models("both shared")
    loss = ibot_loss("both shared")
    loss.attach(student, teacher)
    tokens = views()[0]
    scores = teacher(tokens)
    cls, patch = loss.targets(scores, epoch=2)
    exact = copy.deepcopy(teacher).double()
    y = features(exact, tokens.double())
    for got, part, temperature in ((cls, y[:, 0], 0.05), (patch, y[:, 1:], 0.07)):
        want = equations.teacher(part, exact.head.last_layer, temperature, torch.zeros(K))
        torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-6)
    assert not loss.centering.log_center.any()
    assert len(tokens) == GLOBAL * BATCH
