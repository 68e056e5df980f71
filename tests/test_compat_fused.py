"""The losses of compat.dinov2, lightly and stable_pretraining with fused=True: the same numbers without any logits."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from test_cross_entropy_memory import LargestResult, NewTensors
from vmf_heads import HeadOutput
from vmf_heads.compat import dinov2, lightly, stable_pretraining
from vmf_heads.compat._sinkhorn import sinkhorn_knopp

K, P, IMAGES, PATCHES, CROPS = 96, 4, 6, 9, 4

Step = Callable[[Any, nn.Module, nn.Module, Tensor], Tensor]  # (loss, student's head, teacher's head, tokens)


def mask() -> Tensor:
    """(6, 9), image by image 0, 1, ... masked patches, and all of them in the last."""
    counts = torch.arange(IMAGES)
    counts[-1] = PATCHES
    return torch.arange(PATCHES) < counts[:, None]


def dinov2_cls(loss: Any, student: nn.Module, teacher: nn.Module, tokens: Tensor, *, sinkhorn: bool = False) -> Tensor:
    """As in DINOv2's SSLMetaArch: the teacher's global crops are viewed as crops, the student's come one by one."""
    output = teacher(tokens[:, :2].transpose(0, 1).flatten(0, 1))
    read = loss.sinkhorn_knopp_teacher if sinkhorn else loss.softmax_center_teacher
    targets = read(output, teacher_temp=0.05).view(2, IMAGES, -1)
    if not sinkhorn:
        loss.update_center(output)
    return loss([student(crop) for crop in tokens[:, :CROPS].unbind(dim=1)], targets)


def dinov2_masked(loss: Any, student: nn.Module, teacher: nn.Module, tokens: Tensor) -> Tensor:
    """With rows of padding after the patches, as there."""
    masked = torch.cat([tokens[mask()], torch.zeros(3, tokens.shape[-1], dtype=tokens.dtype)])
    output, n = teacher(masked), int(mask().sum())
    targets = loss.softmax_center_teacher(output[None][:, :n], teacher_temp=0.05).squeeze(0)
    loss.update_center(output[None][:, :n])
    targets = torch.cat([targets, torch.zeros(3, targets.shape[-1], dtype=tokens.dtype)])
    return loss.forward_masked(student(masked), targets, mask(), n_masked_patches=n)


def dinov2_masked_sinkhorn(loss: Any, student: nn.Module, teacher: nn.Module, tokens: Tensor) -> Tensor:
    masked = tokens[mask()]
    return loss.forward_masked(student(masked), loss.sinkhorn_knopp_teacher(teacher(masked), 0.05), mask())


def dinov2_patches(loss: Any, student: nn.Module, teacher: nn.Module, tokens: Tensor) -> Tensor:
    targets = loss.softmax_center_teacher(teacher(tokens), teacher_temp=0.05)
    loss.update_center(teacher(tokens))
    return loss(student(tokens), targets, mask())


def lightly_views(loss: Any, student: nn.Module, teacher: nn.Module, tokens: Tensor) -> Tensor:
    views = tokens.unbind(dim=1)
    return loss([teacher(view) for view in views[:2]], [student(view) for view in views[:CROPS]], epoch=1)


def lightly_more_views_of_the_teacher(loss: Any, student: nn.Module, teacher: nn.Module, tokens: Tensor) -> Tensor:
    views = tokens.unbind(dim=1)
    return loss([teacher(view) for view in views[:3]], [student(view) for view in views[:2]], epoch=1)


def lightly_masked(loss: Any, student: nn.Module, teacher: nn.Module, tokens: Tensor) -> Tensor:
    return loss(teacher(tokens[mask()]), student(tokens[mask()]), mask().view(IMAGES, 3, 3))


def lightly_all(loss: Any, student: nn.Module, teacher: nn.Module, tokens: Tensor) -> Tensor:
    return loss(teacher(tokens), student(tokens), mask(), visible_loss_weight=0.3)


def lightly_unmasked(loss: Any, student: nn.Module, teacher: nn.Module, tokens: Tensor) -> Tensor:
    return loss(teacher(tokens), student(tokens))


def stable_views(
    loss: Any, student: nn.Module, teacher: nn.Module, tokens: Tensor, *, sinkhorn: bool = False
) -> Tensor:
    """As in stable-pretraining's methods, which view the output of all crops as (views, images, columns)."""
    output = teacher(tokens[:, :2].transpose(0, 1).flatten(0, 1)).view(2, IMAGES, -1)
    read = loss.sinkhorn_knopp_teacher if sinkhorn else loss.softmax_center_teacher
    targets = read(output, teacher_temp=0.05)
    value = loss(student(tokens[:, :CROPS].transpose(0, 1).flatten(0, 1)).view(CROPS, IMAGES, -1), targets)
    if not sinkhorn:
        loss.update_center(output)
    return value


def stable_views_sinkhorn(loss: Any, student: nn.Module, teacher: nn.Module, tokens: Tensor) -> Tensor:
    return stable_views(loss, student, teacher, tokens, sinkhorn=True)


def stable_more_views_of_the_teacher(loss: Any, student: nn.Module, teacher: nn.Module, tokens: Tensor) -> Tensor:
    views = tokens.transpose(0, 1)
    return loss(student(views[:2]), loss.softmax_center_teacher(teacher(views[:3]), teacher_temp=0.05))


def stable_masked(loss: Any, student: nn.Module, teacher: nn.Module, tokens: Tensor) -> Tensor:
    """All patches run, and the masked ones are selected from what the heads return."""
    outputs = [head(tokens.flatten(0, 1)).view(IMAGES, PATCHES, -1) for head in (student, teacher)]
    patches, targets = (output.reshape(-1, output.shape[-1])[mask().flatten()] for output in outputs)
    return loss(patches, loss.sinkhorn_knopp_teacher(targets, 0.05, num_samples=len(targets)))


def stable_loss(total: int, **options: Any) -> nn.Module:
    return stable_pretraining.DINOv1Loss(**options)  # `attach` tells it the number of prototypes


def stable_patch_loss(total: int, *, fused: bool, **options: Any) -> nn.Module:
    return stable_pretraining.iBOTPatchLoss(fused=fused)  # which has no centre


def dinov2_cls_sinkhorn(loss: Any, student: nn.Module, teacher: nn.Module, tokens: Tensor) -> Tensor:
    return dinov2_cls(loss, student, teacher, tokens, sinkhorn=True)


CASES: list[tuple[Callable[..., Any], Step]] = [
    (dinov2.DINOLoss, dinov2_cls),
    (dinov2.DINOLoss, dinov2_cls_sinkhorn),
    (dinov2.iBOTPatchLoss, dinov2_masked),
    (dinov2.iBOTPatchLoss, dinov2_masked_sinkhorn),
    (dinov2.iBOTPatchLoss, dinov2_patches),
    (lightly.DINOLoss, lightly_views),
    (lightly.DINOLoss, lightly_more_views_of_the_teacher),
    (lightly.IBOTPatchLoss, lightly_masked),
    (lightly.IBOTPlusPlusPatchLoss, lightly_all),
    (lightly.IBOTPlusPlusPatchLoss, lightly_unmasked),
    (stable_loss, stable_views),
    (stable_loss, stable_views_sinkhorn),
    (stable_loss, stable_more_views_of_the_teacher),
    (stable_patch_loss, stable_masked),
]
ALL = pytest.mark.parametrize(("kind", "step"), CASES, ids=[step.__name__ for _, step in CASES])


def heads() -> tuple[nn.Module, nn.Module]:
    """(student, teacher) in float64, with prototype norms from 0.3 to 3."""
    pair = [dinov2.DINOHead(16, K, hidden_dim=12, bottleneck_dim=P).double() for _ in range(2)]
    for head, lowest in zip(pair, (0.3, 0.5), strict=True):
        head.last_layer.weight_g.data = torch.linspace(lowest, 3, K).double().unsqueeze(1)
    return pair[0], pair[1].requires_grad_(False)


@ALL
@pytest.mark.parametrize("centering", ["logit", "probability"])
def test_fused_is_unfused(kind: Callable[..., Any], step: Step, centering: str) -> None:
    """Losses, gradients and centre of two steps."""
    pair, batches = heads(), [torch.randn(IMAGES, PATCHES, 16, dtype=torch.float64) for _ in range(2)]
    results = []
    for fused in (False, True):
        student, teacher = copy.deepcopy(pair)
        loss = kind(K, centering=centering, fused=fused)
        loss.attach(student, teacher)
        loss.double()
        values = []
        for tokens in batches:
            value = step(loss, student, teacher, tokens)
            values += [value, *torch.autograd.grad(value, list(student.parameters()))]
        results.append((values, loss.state_dict()))
    torch.testing.assert_close(results[1], results[0])


@ALL
def test_fused_holds_no_logits(kind: Callable[..., Any], step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmf_heads._memory.CHUNK_BYTES", {"cpu": 4 * K * 4})
    tokens, fewest_rows = torch.randn(IMAGES, PATCHES, 16, dtype=torch.float64), 2 * IMAGES
    largest = {}
    for fused in (False, True):
        (student, teacher), loss = heads(), kind(K, fused=fused).double()
        loss.attach(student, teacher)
        with LargestResult() as recorder:
            step(loss, student, teacher, tokens).backward()
        largest[fused] = recorder.elements
    assert largest[False] >= fewest_rows * K
    assert largest[True] <= max(4 * K, K * P, tokens.numel())


def test_a_head_that_brings_its_prototypes_along() -> None:
    """As under FSDP2: the loss takes the prototypes from what the heads return."""
    tokens, values = torch.randn(IMAGES, PATCHES, 16, dtype=torch.float64), []
    student, teacher = heads()
    for output in ("features", "prototypes"):
        loss = lightly.IBOTPlusPlusPatchLoss(K, fused=True).double()
        loss.attach(student, teacher)
        student.output = teacher.output = output
        assert isinstance(student(tokens), HeadOutput) is (output == "prototypes")
        values.append(lightly_all(loss, student, teacher, tokens))
        student.release()
        teacher.release()
    torch.testing.assert_close(*values)


def test_order_of_calls_and_shapes() -> None:
    student, teacher = heads()
    loss = dinov2.iBOTPatchLoss(K, fused=True).double()
    loss.attach(student, teacher)
    features = student(torch.randn(IMAGES, PATCHES, 16, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="call `softmax_center_teacher` or `sinkhorn_knopp_teacher` before the loss"):
        loss(features, features.detach(), mask())
    with pytest.raises(ValueError, match=r"`teacher_output` \(of shape \(5, 96\)\) must be \(..., 4\)"):
        loss.softmax_center_teacher(torch.zeros(5, K), 0.05)


def test_sinkhorn_knopp_makes_the_assignments_and_no_second_tensor_of_their_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scores = torch.randn(50, K)
    whole = sinkhorn_knopp(scores, temperature=0.1)
    monkeypatch.setattr("vmf_heads._memory.CHUNK_BYTES", {"cpu": 4 * K * 21})  # 7 rows at a time
    with NewTensors((50, K)) as new:
        chunked = sinkhorn_knopp(scores, temperature=0.1)
    assert len(new.addresses) == 1
    torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-8)
