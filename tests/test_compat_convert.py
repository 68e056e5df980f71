"""Plain DINO to DINO-vMF and back: heads and centres, with DINO's own head and loss written out for comparison."""

import copy

import pytest
import torch
from torch import nn

from dino_models import BATCH, NCROPS, SCHEDULE, K, P, crops, dino_loss, models
from dino_original import OriginalHead, OriginalLoss
from ibot_models import ibot_loss, views
from ibot_models import models as ibot_models
from vmf_heads.compat.convert import logit_center


def plain(model) -> nn.Module:
    """The same backbone with DINO's own head, loaded from the model's state dict as it is."""
    original = copy.deepcopy(model)
    original.head = OriginalHead(16, K, hidden_dim=12, bottleneck_dim=P, norm_last_layer=False)
    original.head.load_state_dict(model.head.state_dict(), strict=True)
    return original


def test_from_plain_dino_to_dino_vmf_and_on():
    """After some plain training with norms of 1 the next loss is the same; the backbone is untouched."""
    student, teacher = (plain(m) for m in models(norms=False))
    student.head.last_layer.weight_g.requires_grad = False
    loss = OriginalLoss(K, NCROPS, **SCHEDULE)
    for _ in range(3):
        x = crops()
        loss(student(x), teacher(x[: 2 * BATCH]), 0)

    vmf_student, vmf_teacher = models()
    vmf_student.load_state_dict(student.state_dict(), strict=True)
    vmf_teacher.load_state_dict(teacher.state_dict(), strict=True)
    vmf_loss = dino_loss()
    vmf_loss.load_state_dict(loss.state_dict(), strict=True)
    vmf_loss.attach(vmf_student, vmf_teacher)
    assert loss.center.abs().max() > 1e-3
    x = crops()
    want = loss(student(x), teacher(x[: 2 * BATCH]), 1)
    with pytest.warns(UserWarning, match="divided by the teacher temperature 0.055"):
        got = vmf_loss(vmf_student(x), vmf_teacher(x[: 2 * BATCH]), 1)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(vmf_student.backbone.state_dict(), student.backbone.state_dict(), rtol=0, atol=0)


def test_from_dino_vmf_to_plain_dino():
    """The plain teacher has the same targets; the plain student the same scores, without log C_p."""
    student, teacher = models()
    loss = dino_loss()
    loss.attach(student, teacher)
    for _ in range(3):
        x = crops()
        loss(student(x), teacher(x[: 2 * BATCH]), 1)
    targets = loss.targets(teacher(x[: 2 * BATCH]), 1)

    plain_student, plain_teacher = plain(student), plain(teacher)
    plain_loss = OriginalLoss(K, NCROPS, **SCHEDULE)
    center = logit_center(loss.state_dict()["log_center"], teacher.head, 0.055)
    plain_loss.load_state_dict({"center": center}, strict=True)
    got = ((plain_teacher(x[: 2 * BATCH]) - plain_loss.center) / 0.055).softmax(dim=1)
    torch.testing.assert_close(got, targets, rtol=1e-4, atol=1e-7)

    log_c = student.head.log_normalizer(0.1)
    torch.testing.assert_close(plain_student(x) + 0.1 * log_c, student(x), rtol=1e-5, atol=1e-6)
    assert log_c.std() > 0.1


def test_patch_centre_of_ibot():
    student, teacher = ibot_models()
    loss = ibot_loss()
    loss.attach(student, teacher)
    tokens, local_tokens, masks = views()
    scores = teacher(tokens)
    loss(student(tokens), scores, student(local_tokens)[0], masks, 1)
    norms = teacher.head.last_layer2.norms
    center2 = logit_center(loss.state_dict()["log_center2"], teacher.head, 0.07, norms=norms)[None]
    assert center2.shape == (1, 1, K)
    got = ((scores[1] - center2) / 0.07).softmax(dim=-1)
    torch.testing.assert_close(got, loss.targets(scores, 1)[1], rtol=1e-4, atol=1e-7)


def test_a_vmf_centre_is_not_taken_for_dinos_own():
    """DINO's script loads with strict=False: it reports the name and leaves its own centre as it was."""
    plain_loss = OriginalLoss(K, NCROPS, **SCHEDULE)
    result = plain_loss.load_state_dict(dino_loss().state_dict() | {"log_center": torch.ones(K)}, strict=False)
    assert result.missing_keys == ["center"]
    assert result.unexpected_keys == ["log_center"]
    assert not plain_loss.center.any()


def test_errors():
    head = models()[1].head
    with pytest.raises(ValueError, match=r"`log_center` \(of shape \(1, 24\)\) must be \(K,\) with K \(=24\)"):
        logit_center(torch.zeros(1, K), head, 0.04)
    with pytest.raises(ValueError, match=r"`teacher_temperature` \(=0\) must be a finite number > 0"):
        logit_center(torch.zeros(K), head, 0)
