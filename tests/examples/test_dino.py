import math

import pytest
import torch
from torch import Tensor

from config import Recipe, load_recipe
from methods.dino import DINO
from metrics import kappa_statistics, target_statistics


@pytest.fixture
def recipe() -> Recipe:
    return load_recipe("photos_dino_vmf", {"hidden_size": 16, "out_dim": 8, "num_hidden_layers": 1})


@pytest.fixture
def crops() -> list[Tensor]:
    return [torch.randn(4, 3, size, size) for size in (32, 32, 16, 16)]


def test_crops_of_one_size_share_a_call_and_keep_their_order(recipe: Recipe, crops: list[Tensor]) -> None:
    student = DINO(recipe).student.eval()
    expected = torch.cat([student([crop]) for crop in crops])
    calls: list[str] = []
    student.backbone.register_forward_hook(lambda *_: calls.append("backbone"))
    student.head.register_forward_hook(lambda *_: calls.append("head"))
    torch.testing.assert_close(student(crops), expected)
    mixed = [crops[index] for index in (2, 0, 3, 1)]
    torch.testing.assert_close(student(mixed).chunk(4)[1], expected.chunk(4)[0])
    assert calls == ["backbone", "backbone", "head"] * 2


def test_the_heads_mlp_starts_with_the_recipes_scale_too(recipe: Recipe) -> None:
    head = DINO(recipe).student.head
    assert head.mlp[2].weight.std().item() == pytest.approx(recipe.initializer_range, rel=0.1)


def test_the_teacher_starts_as_the_student_and_gets_no_gradient(recipe: Recipe, crops: list[Tensor]) -> None:
    method = DINO(recipe)
    ours, theirs = method.student.state_dict(), method.teacher.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    loss, _ = method(crops, 0)
    loss.backward()
    assert all(p.grad is None for p in method.teacher.parameters())
    assert all(p.grad.isfinite().all() for p in method.student.parameters())


def test_a_method_survives_its_state_dict(recipe: Recipe, crops: list[Tensor]) -> None:
    method = DINO(recipe)
    method(crops, 0)
    copy = DINO(recipe)
    copy.load_state_dict(method.state_dict())
    assert method(crops, 1)[0].item() == copy(crops, 1)[0].item()  # which needs the same centre


def test_entropies_of_spread_shared_and_split_targets() -> None:
    uniform = torch.full((6, 8), 1 / 8)
    one, own = torch.eye(8)[[0] * 8], torch.eye(8)
    loss = torch.tensor(3.0)
    for targets, entropy, marginal in [(uniform, math.log(8), math.log(8)), (one, 0, 0), (own, 0, math.log(8))]:
        statistics = target_statistics(targets, loss)
        assert statistics["target_entropy"].item() == pytest.approx(entropy, abs=1e-6)
        assert statistics["marginal_entropy"].item() == pytest.approx(marginal, abs=1e-6)
        assert statistics["kl"].item() == pytest.approx(3 - entropy, abs=1e-6)


def test_quantiles_of_kappa() -> None:
    statistics = kappa_statistics(torch.arange(101.0)[torch.randperm(101)])
    expected = {"kappa_min": 0, "kappa_p05": 5, "kappa_p50": 50, "kappa_p95": 95, "kappa_max": 100}
    assert {name: value.item() for name, value in statistics.items()} == pytest.approx(expected)
