"""A loss of no images says so, instead of NaN; a term of no masked patches is 0."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dino_models import K, crops, dino_loss, models
from vmf_heads.compat import dinov2, ibot, lightly, msn

# The tensors here are not what a head returned.
pytestmark = pytest.mark.filterwarnings("ignore:the (teacher|student)'s head did not run:UserWarning")
NONE = r"must hold at least one image"


def dino(images: int, **options: Any) -> None:
    (student, teacher), loss = models(), dino_loss(**options)
    loss.attach(student, teacher)
    x = crops(images)
    loss(student(x), teacher(x[: 2 * images]), 0)


def ibot_loss(images: int, **options: Any) -> None:
    student, teacher = (ibot.iBOTHead(6, K, patch_out_dim=K, hidden_dim=8, bottleneck_dim=4) for _ in "st")
    loss = ibot.iBOTLoss(K, K, 2, 0, 0.04, 0.07, 0.04, 0.07, 3, 10, **options)
    loss.attach(student, teacher)
    x = torch.randn(2 * images, 5, 6)
    loss(student(x), teacher(x), None, [torch.zeros(images, 2, 2, dtype=torch.bool)] * 2, 0)


def attached(loss: Any) -> Any:
    loss.attach(*(dinov2.DINOHead(6, K, hidden_dim=8, bottleneck_dim=4) for _ in "st"))
    return loss


def dinov2_cls(images: int) -> None:
    views = torch.randn(2, images, K)
    attached(dinov2.DINOLoss(K))(list(views), views.softmax(dim=-1))


def dinov2_patches(images: int) -> None:
    tokens = torch.randn(images, 4, K)
    attached(dinov2.iBOTPatchLoss(K))(tokens, tokens.softmax(dim=-1), torch.ones(images, 4, dtype=torch.bool))


def dinov2_masked(images: int) -> None:
    tokens = torch.randn(4 * images, K)
    mask = torch.ones(images, 4, dtype=torch.bool)
    attached(dinov2.iBOTPatchLoss(K)).forward_masked(tokens, tokens.softmax(dim=-1), mask)


def lightly_cls(images: int) -> None:
    views = torch.randn(2, images, K)
    attached(lightly.DINOLoss(K))(list(views), list(views))


def lightly_patches(images: int) -> None:
    tokens, mask = torch.randn(4 * images, K), torch.ones(images, 2, 2, dtype=torch.bool)
    attached(lightly.IBOTPatchLoss(K))(tokens, tokens, mask)


def lightly_all_patches(images: int) -> None:
    tokens = torch.randn(images, 4, K)
    attached(lightly.IBOTPlusPlusPatchLoss(K))(tokens, tokens)


def msn_loss(images: int) -> None:
    y = torch.randn(images, 6)
    msn.init_msn_loss(num_views=1)(y, y, torch.randn(K, 6), torch.eye(K))


CALLS: dict[str, Callable[[int], None]] = {
    "dino": dino,
    "dino, fused": lambda images: dino(images, fused=True),
    "ibot": ibot_loss,
    "ibot, fused": lambda images: ibot_loss(images, fused=True),
    **{f.__name__: f for f in (dinov2_cls, dinov2_patches, dinov2_masked)},
    **{f.__name__: f for f in (lightly_cls, lightly_patches, lightly_all_patches, msn_loss)},
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_no_images(call: Callable[[int], None]) -> None:
    call(1)
    with pytest.raises(ValueError, match=NONE):
        call(0)


@pytest.mark.parametrize("fused", [False, True])
def test_no_masked_patches(fused: bool) -> None:
    student, teacher = (ibot.iBOTHead(6, K, patch_out_dim=K, hidden_dim=8, bottleneck_dim=4) for _ in "st")
    loss = ibot.iBOTLoss(K, K, 2, 0, 0.04, 0.07, 0.04, 0.07, 3, 10, fused=fused)
    loss.attach(student, teacher)
    x = torch.randn(2 * 3, 5, 6)
    losses = loss(student(x), teacher(x), None, [torch.zeros(3, 2, 2, dtype=torch.bool)] * 2, 0)
    assert losses["patch"] == 0
    losses["loss"].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in student.parameters())


def test_a_rank_without_rows_only_joins_the_centre() -> None:
    """`update_center` and `targets` take no rows: other ranks may have some."""
    loss = dino_loss()
    loss.attach(*models())
    before = loss.log_center.clone()
    loss.update_center(torch.ones(0, K), 0)
    assert loss.targets(torch.ones(0, K), 0).shape == (0, K)
    torch.testing.assert_close(loss.log_center, before, rtol=0, atol=0)
