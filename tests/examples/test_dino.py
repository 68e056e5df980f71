import math
from typing import Any

import pytest
import torch
from torch import Tensor

from config.recipe import Recipe, load_recipe
from methods.method import sample_rows
from methods.registry import Method, build_method
from vmf_heads import HeadOutput

TINY = {"hidden_size": 16, "out_dim": 8, "num_hidden_layers": 1}


def attached(**overrides: Any) -> Method:
    method = build_method(load_recipe("photos_dino_vmf", TINY | overrides))
    method.attach()
    return method


@pytest.fixture
def recipe() -> Recipe:
    return load_recipe("photos_dino_vmf", TINY)


@pytest.fixture
def crops() -> list[Tensor]:
    return [torch.randn(4, 3, size, size) for size in (32, 32, 16, 16)]


def test_crops_of_one_kind_share_a_call_and_keep_their_order(recipe: Recipe, crops: list[Tensor]) -> None:
    student = build_method(recipe).student.eval()
    expected = torch.cat([student([crop]) for crop in crops])
    calls: list[str] = []
    student.backbone.layernorm.register_forward_hook(lambda *_: calls.append("backbone"))
    student.head.register_forward_hook(lambda *_: calls.append("head"))
    torch.testing.assert_close(student(crops), expected)
    mixed = [crops[index] for index in (2, 0, 3, 1)]
    torch.testing.assert_close(student(mixed).chunk(4)[1], expected.chunk(4)[0])
    assert calls == ["backbone", "backbone", "head"] * 2

    keep = [torch.arange(16).expand(4, -1), torch.arange(9).expand(4, -1)]
    kept = student([crops[1], crops[0], *crops[2:]], keep[:1]).chunk(4)  # all patches of the first, and no others
    torch.testing.assert_close(torch.cat([kept[1], kept[0], *kept[2:]]), expected)
    assert calls[6:] == ["backbone", "backbone", "backbone", "head"]
    assert not torch.allclose(student(crops, keep[1:])[:4], expected[:4])


def test_the_heads_mlp_starts_with_the_recipes_scale_too(recipe: Recipe) -> None:
    head = build_method(recipe).student.head
    assert head.mlp[2].weight.std().item() == pytest.approx(recipe.initializer_range, rel=0.1)


def test_the_fused_loss_is_the_plain_one(crops: list[Tensor]) -> None:
    found = []
    for fused in (True, False):
        method = attached(fused_loss=fused)
        for _ in range(2):  # the second with a centre
            loss, statistics = method({"crops": crops}, 3)
        loss.backward()
        gradients = {f"grad {name}": p.grad for name, p in method.student.named_parameters()}
        found.append({"loss": loss} | statistics | gradients | method.loss.state_dict())
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_the_targets_statistics_are_those_of_equation_7(crops: list[Tensor]) -> None:
    method = attached()
    method({"crops": crops}, 0)
    features = torch.cat([method.teacher.backbone(crop).last_hidden_state[:, 0] for crop in crops[:2]])
    targets = method.targets(method.scores(features), 0).detach()
    _, statistics = method({"crops": crops}, 0)
    entropy = -(targets * targets.log()).sum(1)
    torch.testing.assert_close(statistics["target_entropy"], entropy.mean())
    mean = targets.mean(0)
    torch.testing.assert_close(statistics["marginal_entropy"], -(mean * mean.log()).sum())


@pytest.mark.parametrize("cell", [("vmf", "probability"), ("vmf", "logit"), ("none", "logit")])
def test_scores_and_targets_are_those_of_an_attached_loss(cell: tuple[str, str], crops: list[Tensor]) -> None:
    switches = dict(zip(("normalization", "centering"), cell, strict=True))
    fused, plain = attached(**switches), attached(**switches, fused_loss=False)
    for method in (fused, plain):
        torch.nn.init.uniform_(method.teacher.head.last_layer.weight_g, 0.5, 2, generator=torch.manual_seed(0))
        method({"crops": crops}, 0)
    features = torch.randn(6, 16)
    scores = plain.teacher.head(features)
    for method in (fused, plain):
        torch.testing.assert_close(method.scores(features), scores)
        torch.testing.assert_close(method.targets(scores, 4), plain.loss.targets(scores, 4))


def test_sampled_rows_are_few_and_spread() -> None:
    rows = torch.arange(1000.0).unsqueeze(1)
    sample = sample_rows(rows).flatten()
    assert sample.tolist() == list(range(0, 1000, 4))
    output = sample_rows(HeadOutput(rows.view(10, 100, 1), torch.ones(3, 1), torch.ones(3)))
    assert torch.equal(output.features.flatten(), sample)
    assert torch.equal(sample_rows(rows[:256]), rows[:256])
    assert math.ceil(257 / 2) == len(sample_rows(rows[:257]))
