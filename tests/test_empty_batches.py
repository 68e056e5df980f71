"""A loss of no images says so, instead of NaN; a term of no masked patches is 0."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dino_models import K, crops, dino_loss, models
from vmf_heads.compat import dinov2, esvit, ibot, lightly, msn, stable_pretraining

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


def dino_head() -> nn.Module:
    return dinov2.DINOHead(6, K, hidden_dim=8, bottleneck_dim=4)


def attached(loss: Any) -> Any:
    loss.attach(dino_head(), dino_head())
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


def esvit_regions(images: int, **options: Any) -> None:
    heads = ("head", "head_dense")
    student, teacher = (nn.ModuleDict({name: dino_head() for name in heads}) for _ in "st")
    loss = esvit.DDINOLoss(K, 2, 0.04, 0.07, 3, 10, **options)
    loss.attach(student, teacher)
    views, regions = torch.randn(2 * images, 6), torch.randn(2 * images * 4, 6)
    seen = ((model["head"](views), model["head_dense"](regions), regions, [4]) for model in (student, teacher))
    loss(*seen, 0)


def stable_pretraining_cls(images: int) -> None:
    views, loss = torch.randn(2, images, K), stable_pretraining.DINOv1Loss()
    loss.attach(*projectors())
    loss(views, views.softmax(dim=-1))


def stable_pretraining_patches(images: int) -> None:
    patches, loss = torch.randn(images, K), stable_pretraining.iBOTPatchLoss()
    loss.attach(*projectors())
    loss(patches, patches.softmax(dim=-1))


def projectors() -> list[nn.Module]:
    return [stable_pretraining.DINOProjector(6, 8, 4, K) for _ in "st"]


def msn_loss(images: int) -> None:
    y = torch.randn(images, 6)
    msn.init_msn_loss(num_views=1)(y, y, torch.randn(K, 6), torch.eye(K))


CALLS: dict[str, Callable[[int], None]] = {
    "dino": dino,
    "dino, fused": lambda images: dino(images, fused=True),
    "ibot": ibot_loss,
    "ibot, fused": lambda images: ibot_loss(images, fused=True),
    "esvit_regions, fused": lambda images: esvit_regions(images, fused=True),
    **{f.__name__: f for f in (esvit_regions, stable_pretraining_cls, stable_pretraining_patches)},
    **{f.__name__: f for f in (dinov2_cls, dinov2_patches, dinov2_masked)},
    **{f.__name__: f for f in (lightly_cls, lightly_patches, lightly_all_patches, msn_loss)},
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_no_images(call: Callable[[int], None]) -> None:
    call(1)
    with pytest.raises(ValueError, match=NONE):
        call(0)


def ibot_unmasked(**options: Any) -> tuple[Tensor, list[Tensor]]:
    student, teacher = (ibot.iBOTHead(6, K, patch_out_dim=K, hidden_dim=8, bottleneck_dim=4) for _ in "st")
    loss = ibot.iBOTLoss(K, K, 2, 0, 0.04, 0.07, 0.04, 0.07, 3, 10, **options)
    loss.attach(student, teacher)
    x, nothing = torch.randn(2 * 3, 5, 6), [torch.zeros(3, 2, 2, dtype=torch.bool)] * 2
    losses = loss(student(x), teacher(x), None, nothing, 0)
    losses["cls"].backward(retain_graph=True)
    assert all(p.grad is None or p.grad.isfinite().all() for p in student.parameters())
    return losses["patch"], list(student.parameters())


def dinov2_unmasked() -> tuple[Tensor, list[Tensor]]:
    tokens, nothing = torch.randn(3, 4, K, requires_grad=True), torch.zeros(3, 4, dtype=torch.bool)
    loss, targets = attached(dinov2.iBOTPatchLoss(K)), tokens.detach().softmax(dim=-1)
    of_masked = loss.forward_masked(tokens[nothing], targets[nothing], nothing)
    return loss(tokens, targets, nothing) + of_masked, [tokens]


def lightly_unmasked(**options: Any) -> tuple[Tensor, list[Tensor]]:
    loss = attached(lightly.IBOTPatchLoss(K, **options))
    tokens = torch.randn(0, 4 if loss.fused else K, requires_grad=True)
    return loss(tokens.detach(), tokens, torch.zeros(3, 2, 2, dtype=torch.bool)), [tokens]


UNMASKED: dict[str, Callable[[], tuple[Tensor, list[Tensor]]]] = {
    "ibot": ibot_unmasked,
    "ibot, fused": lambda: ibot_unmasked(fused=True),
    "dinov2": dinov2_unmasked,
    "lightly": lightly_unmasked,
    "lightly, fused": lambda: lightly_unmasked(fused=True),
}


@pytest.mark.parametrize("call", UNMASKED.values(), ids=UNMASKED)
def test_no_masked_patches(call: Callable[[], tuple[Tensor, list[Tensor]]]) -> None:
    loss, learning = call()
    assert loss == 0
    gradients = torch.autograd.grad(loss, learning, allow_unused=True)
    assert all(gradient is None or gradient.eq(0).all() for gradient in gradients)


def test_a_rank_without_rows_only_joins_the_centre() -> None:
    """`update_center` and `targets` take no rows: other ranks may have some."""
    loss = dino_loss()
    loss.attach(*models())
    before = loss.log_center.clone()
    loss.update_center(torch.ones(0, K), 0)
    assert loss.targets(torch.ones(0, K), 0).shape == (0, K)
    torch.testing.assert_close(loss.log_center, before, rtol=0, atol=0)
