"""compat.solo: solo-learn's names over the loss of compat.dino, whose tests are those of the numbers."""

import pytest
import torch
from torch import nn

from dino_original import OriginalHead, OriginalLoss
from vmf_heads.compat.dino import DINOLoss as SameLoss
from vmf_heads.compat.solo import DINOHead, DINOLoss

K, P, BATCH = 24, 8, 5


def heads(**options) -> tuple[DINOHead, DINOHead]:
    pair = [DINOHead(16, K, hidden_dim=12, bottleneck_dim=P, **options) for _ in range(2)]
    return pair[0], pair[1].requires_grad_(False)


def test_at_norm_one_with_logit_centring_it_is_solo_learns_loss():
    """`epoch` is set from outside, and the head has batch normalisation unless it is told otherwise."""
    student, teacher = heads(norm_last_layer=True)
    loss = DINOLoss(K, 0.04, 0.07, warmup_teacher_temp_epochs=3, num_epochs=5, centering="logit")
    with pytest.warns(UserWarning, match="prototype norms are frozen"):
        loss.attach(student, teacher)
    plain = [OriginalHead(16, K, use_bn=True, hidden_dim=12, bottleneck_dim=P) for _ in range(2)]
    for original, head in zip(plain, (student, teacher), strict=True):
        original.load_state_dict(head.state_dict(), strict=True)
    original_loss = OriginalLoss(K, 2, 0.04, 0.07, 3, 5)
    for epoch in (0, 1, 4):
        loss.epoch = epoch
        views = torch.randn(2 * BATCH, 16)
        got, want = loss(student(views), teacher(views)), original_loss(plain[0](views), plain[1](views), epoch)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss.state_dict(), original_loss.state_dict(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("fused", [False, True])
def test_it_is_the_loss_of_compat_dino_at_its_epoch(fused):
    student, teacher = heads(use_bn=False)
    student.last_layer.weight_g.data = torch.linspace(0.3, 3, K)[:, None]
    loss = DINOLoss(K, 0.04, 0.07, 3, 5, fused=fused)
    same = SameLoss(K, 2, 0.04, 0.07, 3, 5, fused=fused)
    for each in (loss, same):
        each.attach(student, teacher)
    loss.epoch = 1
    views = torch.randn(2 * BATCH, 16)
    output = student(views), teacher(views)
    torch.testing.assert_close(loss.targets(output[1]), same.targets(output[1], 1), rtol=0, atol=0)
    torch.testing.assert_close(loss(*output), same(*output, 1), rtol=0, atol=0)
    loss.update_center(output[1])
    same.update_center(output[1], 1)
    torch.testing.assert_close(loss.state_dict(), same.state_dict(), rtol=0, atol=0)


def test_a_head_of_one_layer():
    head = DINOHead(16, K, num_layers=0, bottleneck_dim=P)
    assert isinstance(head.mlp, nn.Linear)
    assert [name for name, _ in head.named_parameters()][-2:] == ["last_layer.weight_g", "last_layer.weight_v"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DINOHead(16, 0), r"`num_prototypes` \(=0\) must be an integer >= 1"),
        (lambda: DINOLoss(0, 0.04, 0.07, 3, 5), r"`num_prototypes` \(=0\) must be an integer >= 1"),
        (lambda: DINOLoss(K, 0.04, 0.07, 3, 0), r"`num_epochs` \(=0\) must be an integer >= 1"),
        (lambda: DINOLoss(K, 0.04, 0.07, 3, 5, num_large_crops=1), r"`num_large_crops` \(=1\) must be an integer >= 2"),
    ],
)
def test_constructors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
