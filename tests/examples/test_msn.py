"""MSN's loss against its definition in probabilities and float64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import vmf_reference
from config.recipe import load_recipe
from data.loading import micro_batch_size
from methods.backbone import tokens
from methods.registry import Method, build_method

TINY = {"hidden_size": 16, "out_dim": 12, "num_hidden_layers": 1, "hidden_dim": 16, "bottleneck_dim": 8}
IMAGES, TAU, T = 5, 0.1, 0.25


def make_method(**overrides: Any) -> Method:
    generator = torch.Generator().manual_seed(0)
    method = build_method(load_recipe("photos_msn_vmf", TINY | {"msn.patch_drop": 0.4} | overrides)).double()
    for name, parameter in method.named_parameters():
        if parameter.requires_grad or name.startswith("teacher."):
            low, high = (0.4, 3) if name.endswith("weight_g") else (-0.3, 0.3)
            with torch.no_grad():
                parameter.uniform_(low, high, generator=generator)
    method.attach()
    return method


def make_batch(rand_views: int) -> dict[str, list[Tensor]]:
    sizes = [32] * (1 + rand_views) + [16, 16]
    crops = [torch.randn(IMAGES, 3, size, size, dtype=torch.float64) for size in sizes]
    keep = [torch.stack([torch.randperm(16)[:9] for _ in range(IMAGES)]) for _ in range(rand_views)]
    return {"crops": crops, "keep": keep}


def projected(network: Any, crop: Tensor, keep: Tensor | None = None) -> Tensor:
    y = network.head.mlp(tokens(network.backbone, crop, keep=keep)[:, 0])
    return y / y.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("sinkhorn", [True, False])
@pytest.mark.parametrize(("normalization", "rand_views"), [("l2", 1), ("vmf", 2)])
def test_the_loss_is_msns(normalization: str, rand_views: int, sinkhorn: bool) -> None:
    own = {"msn.rand_views": rand_views, "msn.me_max_weight": 0.8, "msn.entropy_weight": 0.3, "msn.sinkhorn": sinkhorn}
    method, batch = make_method(normalization=normalization, **own), make_batch(rand_views)
    target, *anchors = batch["crops"]
    layer = method.student.head.last_layer  # the student's, for the target, too
    w = layer.weight_v / layer.weight_v.norm(dim=1, keepdim=True)
    log_c = torch.zeros(12, dtype=torch.float64)
    if normalization == "vmf":
        w = layer.weight_g * w
        log_c = vmf_reference.with_gradient(w.norm(dim=1), 8, TAU)

    keep = [*batch["keep"], None, None]
    features = [projected(method.student, crop, kept) for crop, kept in zip(anchors, keep, strict=True)]
    predictions = torch.cat([(y @ w.T / TAU + log_c).softmax(1) for y in features])
    sharpened = ((projected(method.teacher, target) @ w.T / TAU + log_c).softmax(1) ** (1 / T)).detach()
    targets = sharpened / sharpened.sum(1, keepdim=True)
    for _ in range(3 if sinkhorn else 0):
        targets = targets / targets.sum(0) / 12
        targets = targets / targets.sum(1, keepdim=True)
    cross_entropy = -(targets.repeat(len(anchors), 1) * predictions.log()).sum(1).mean()
    mean = predictions.mean(0)
    me_max = math.log(12) + (mean * mean.log()).sum()
    entropy = -(predictions * predictions.log()).sum(1).mean()

    loss, statistics = method(batch, epoch=0)
    torch.testing.assert_close(loss, cross_entropy + 0.8 * me_max + 0.3 * entropy, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(statistics["cross_entropy"], cross_entropy.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(statistics["me_max"], me_max.detach(), rtol=1e-9, atol=1e-9)
    target_entropy = -torch.special.xlogy(targets, targets).sum(1).mean()
    torch.testing.assert_close(statistics["target_entropy"], target_entropy, rtol=1e-9, atol=1e-9)
    trained = [parameter for parameter in method.student.parameters() if parameter.requires_grad]
    wanted = torch.autograd.grad(cross_entropy + 0.8 * me_max + 0.3 * entropy, trained)
    torch.testing.assert_close(torch.autograd.grad(loss, trained), wanted, rtol=1e-6, atol=1e-9)


def test_the_sharpening_follows_the_teachers_temperature() -> None:
    warming = {"teacher_temp_warmup": 0.02, "teacher_temp": 0.04, "teacher_temp_warmup_epochs": 3}
    loss = make_method(**warming).loss
    assert [loss.sharpening(epoch) for epoch in range(5)] == pytest.approx([0.2, 0.3, 0.4, 0.4, 0.4])
    assert len(loss.teacher_temp_schedule) == 16


def test_scores_and_targets_come_from_the_students_prototypes() -> None:
    method, features = make_method(), torch.randn(6, 16, dtype=torch.float64)
    y = method.teacher.head.mlp(features)
    y = y / y.norm(dim=1, keepdim=True)
    w = method.student.head.last_layer.weight
    torch.testing.assert_close(method.scores(features), (y @ w.T).detach())
    log_c = vmf_reference.log_normalizer(w.norm(dim=1).detach() / TAU, 8)
    powers = (y @ w.T / TAU + log_c).softmax(1) ** (1 / T)
    torch.testing.assert_close(method.targets(y @ w.T, 0), powers / powers.sum(1, keepdim=True))


def test_a_batch_cannot_be_cut() -> None:
    with pytest.raises(
        ValueError, match=r"`accumulate` \(=2\) must be 1 with `method` 'msn': me-max is of a whole batch"
    ):
        micro_batch_size(load_recipe("photos_msn"), 2)
