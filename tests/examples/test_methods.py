"""What holds for every method: equal starts, a teacher without gradients, states that can be loaded."""

from typing import Any

import pytest
import torch

from config.recipe import load_recipe
from data.augmented_images import AugmentedImages
from data.images import load_images
from data.views import build_views, finished_batch
from methods.registry import Method, build_method
from vmf_heads.prototypes import Prototypes
from vmf_heads.regularizers import prototype_koleo

TINY = {"hidden_size": 16, "out_dim": 8, "num_hidden_layers": 1, "hidden_dim": 16, "bottleneck_dim": 8}
RECIPES = [f"photos_{method}{form}" for method in ("dino", "ibot", "msn") for form in ("", "_vmf")]


def tiny(name: str) -> dict[str, Any]:
    return TINY | ({"ibot.patch_out_dim": 8} if "ibot" in name else {})


def attached(name: str, **overrides: Any) -> Method:
    method = build_method(load_recipe(name, tiny(name) | overrides))
    method.attach()
    return method


def batch(name: str, images: int = 4) -> dict[str, Any]:
    recipe = load_recipe(name, tiny(name))
    dataset = AugmentedImages(load_images("photos", "train"), build_views(recipe), recipe.seed)
    return finished_batch([dataset[index * 100] for index in range(images)])


@pytest.mark.parametrize("name", RECIPES)
def test_the_teacher_starts_as_the_student_and_gets_no_gradient(name: str) -> None:
    method = attached(name)
    ours, theirs = method.student.state_dict(), method.teacher.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    loss, _ = method(batch(name), 0)
    loss.backward()
    assert all(parameter.grad is None for parameter in method.teacher.parameters())
    for key, parameter in method.student.named_parameters():
        frozen = key.endswith("weight_g") and method.recipe.normalization == "l2"
        assert parameter.requires_grad is not frozen, key
        assert frozen or parameter.grad.isfinite().all(), key
        assert frozen or parameter.grad.abs().max() > 0, key


@pytest.mark.parametrize("name", RECIPES)
def test_equal_recipes_start_equal_and_other_seeds_do_not(name: str) -> None:
    torch.manual_seed(5)
    first, second, other = attached(name), attached(name), attached(name, seed=1)
    assert torch.equal(torch.get_rng_state(), torch.manual_seed(5).get_state())  # it draws from a generator of its own
    states = [method.student.state_dict() for method in (first, second, other)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not torch.equal(states[0]["head.last_layer.weight_v"], states[2]["head.last_layer.weight_v"])


@pytest.mark.parametrize("name", RECIPES)
def test_a_method_survives_its_state_dict(name: str) -> None:
    method, crops = attached(name), batch(name)
    method(crops, 0)
    copy = attached(name)
    copy.load_state_dict(method.state_dict())
    assert method(crops, 1)[0].item() == copy(crops, 1)[0].item()  # which needs the same centres


@pytest.mark.parametrize("name", RECIPES)
def test_evaluation_sees_scores_and_targets(name: str) -> None:
    method = attached(name)
    method(batch(name), 0)
    features = torch.randn(6, 16)
    scores = method.scores(features)
    assert scores.shape == (6, 8)
    assert not scores.requires_grad
    targets = method.targets(scores, 3)
    torch.testing.assert_close(targets.sum(1), torch.ones(6))
    assert (targets.argmax(1) != targets.argmax(1)[0]).any()


@pytest.mark.parametrize(("name", "layers"), [("photos_dino_vmf", 1), ("photos_ibot_vmf", 1), ("photos_ibot", 2)])
def test_koleo_counts_each_layer_of_prototypes_once_with_its_gradient(name: str, layers: int) -> None:
    more = {"ibot.shared_head": False} if layers == 2 else {}
    plain, spread = attached(name, **more), attached(name, **more, prototype_koleo_weight=0.5)
    crops = batch(name)
    losses = [method(crops, 0) for method in (plain, spread)]
    own = {id(layer): layer for layer in spread.student.modules() if isinstance(layer, Prototypes)}
    koleo = torch.stack([prototype_koleo(layer.weight_v) for layer in own.values()]).sum()
    assert len(own) == layers
    torch.testing.assert_close(losses[1][0], losses[0][0] + 0.5 * koleo)
    torch.testing.assert_close(losses[1][1]["koleo"], koleo.detach())
    torch.testing.assert_close(losses[1][1]["kl"], losses[0][1]["kl"])  # between targets and predictions alone
    for loss, _ in losses:
        loss.backward()
    before, after = (method.student.head.last_layer.weight_v for method in (plain, spread))
    (of_koleo,) = torch.autograd.grad(0.5 * prototype_koleo(before), before)
    torch.testing.assert_close(after.grad, before.grad + of_koleo)
    assert (of_koleo.abs() > 1e-3 * before.grad.abs()).any()
