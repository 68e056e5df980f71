import dataclasses

import pytest
import torch
from torch import Tensor
from transformers import ViTModel

from config.recipe import Recipe, load_recipe
from methods.backbone import build_backbone, build_vit, cls_token, tokens


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


def test_kept_patches_are_chosen_after_the_position_embeddings(recipe: Recipe) -> None:
    backbone, images = build_backbone(recipe).eval(), torch.randn(3, 3, 48, 64)  # 6 x 8 patches: interpolated positions
    keep = torch.stack([torch.randperm(48)[:20] for _ in range(3)])

    def choose(_module: object, _inputs: object, embedded: Tensor) -> Tensor:
        return torch.stack([row[[0, *(1 + index).tolist()]] for row, index in zip(embedded, keep, strict=True)])

    kept = tokens(backbone, images, keep=keep)
    hook = backbone.embeddings.register_forward_hook(choose)  # the whole model on the embeddings of these patches
    expected = backbone(images, interpolate_pos_encoding=True).last_hidden_state
    hook.remove()
    torch.testing.assert_close(kept, expected, rtol=0, atol=0)
    everything = torch.arange(48).expand(3, -1)
    torch.testing.assert_close(tokens(backbone, images, keep=everything), tokens(backbone, images))
    torch.testing.assert_close(cls_token(backbone, images, keep=keep), kept[:, 0], rtol=0, atol=0)


def test_masked_patches_are_not_seen(recipe: Recipe, images: Tensor) -> None:
    backbone = build_vit(recipe, mask_token=True).eval()
    torch.nn.init.normal_(backbone.embeddings.mask_token)
    mask = torch.rand(5, 4, 4) < 0.4
    pixels = mask.repeat_interleave(8, 1).repeat_interleave(8, 2).unsqueeze(1)  # patches are numbered row by row
    other = torch.where(pixels, torch.randn_like(images), images)
    hidden = tokens(backbone, images, mask=mask.flatten(1))
    torch.testing.assert_close(tokens(backbone, other, mask=mask.flatten(1)), hidden, rtol=0, atol=0)
    assert not torch.allclose(tokens(backbone, other), tokens(backbone, images))
    torch.testing.assert_close(tokens(backbone, images, mask=torch.zeros(5, 16) > 0), tokens(backbone, images))
    hidden.square().sum().backward()
    assert backbone.embeddings.mask_token.grad.abs().min() > 0


def test_a_mask_token_changes_no_other_weight(recipe: Recipe) -> None:
    torch.manual_seed(1)
    plain = build_backbone(recipe).state_dict()
    torch.manual_seed(1)
    masked = build_vit(recipe, mask_token=True).state_dict()
    assert masked.pop("embeddings.mask_token").abs().max() == 0
    assert masked.keys() == plain.keys()
    assert all(torch.equal(masked[name], plain[name]) for name in plain)


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
