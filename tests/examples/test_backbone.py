import dataclasses

import pytest
import torch
from torch import Tensor
from transformers import ViTModel

from backbone import build_backbone, cls_token
from config import Recipe, load_recipe


@pytest.fixture
def recipe() -> Recipe:
    small = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    return dataclasses.replace(load_recipe("photos_dino_vmf"), **small)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(5, 3, 32, 32)


def test_cls_token_is_the_first_token_after_the_last_norm(recipe: Recipe, images: Tensor) -> None:
    backbone = build_backbone(recipe).eval()
    expected = backbone(images).last_hidden_state[:, 0]  # without any interpolation
    torch.testing.assert_close(cls_token(backbone, images), expected, rtol=0, atol=0)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (48, 64)])
def test_other_sizes_use_interpolated_positions(recipe: Recipe, height: int, width: int) -> None:
    assert cls_token(build_backbone(recipe), torch.randn(2, 3, height, width)).shape == (2, 16)


def test_the_weights_have_the_recipes_scale(recipe: Recipe) -> None:
    backbone = build_backbone(dataclasses.replace(recipe, initializer_range=0.125))
    assert backbone.layers[1].mlp.fc1.weight.std().item() == pytest.approx(0.125, rel=0.1)


def test_drop_path_adds_no_names_and_does_nothing_in_eval_mode(recipe: Recipe, images: Tensor) -> None:
    plain, dropping = build_backbone(recipe).eval(), build_backbone(recipe, drop_path=0.5).eval()
    dropping.load_state_dict(plain.state_dict())
    assert list(dropping.state_dict()) == list(plain.state_dict())
    torch.testing.assert_close(cls_token(dropping, images), cls_token(plain, images), rtol=0, atol=0)
    dropping.train()
    assert not torch.allclose(cls_token(dropping, images), cls_token(plain, images))


def without_last_layer(backbone: ViTModel, images: Tensor) -> Tensor:
    hidden = backbone(images, output_hidden_states=True).hidden_states[-2]
    return backbone.layernorm(hidden)[:, 0]


def test_the_rate_rises_linearly_to_the_last_layer(recipe: Recipe, images: Tensor) -> None:
    two_layers = dataclasses.replace(recipe, num_hidden_layers=2)
    # Certain to drop (but for 2e-6) in the last of two layers, certain to keep in the first.
    backbone = build_backbone(two_layers, drop_path=1 - 1e-7).train()
    torch.testing.assert_close(cls_token(backbone, images), without_last_layer(backbone, images))
    middle = build_backbone(recipe, drop_path=0.5).train().layers[1]
    torch.manual_seed(0)
    ones = torch.ones(4000, 1, 16)
    (hook,) = middle.mlp._forward_hooks.values()
    dropped = hook(middle.mlp, (), ones)[:, 0]
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.75])  # rescaled
    assert (dropped[:, :1] == dropped).all()  # whole samples
    assert dropped.mean().item() == pytest.approx(1, abs=0.05)
