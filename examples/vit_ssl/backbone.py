"""The vision transformer that is pretrained: a transformers ViTModel, with DINO's stochastic depth."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

from config import Recipe


def build_backbone(recipe: Recipe, *, drop_path: float = 0.0) -> ViTModel:
    """A randomly initialised ViT without pooler; weights are drawn from torch's global generator.

    `drop_path` is the rate of the last layer, rising linearly from 0 at the first, as in DINO's student (its teacher
    has none). It adds no parameters and no names: the state dict and `save_pretrained` are those of a plain ViTModel.
    """
    config = ViTConfig(
        image_size=recipe.image_size,
        patch_size=recipe.patch_size,
        hidden_size=recipe.hidden_size,
        num_hidden_layers=recipe.num_hidden_layers,
        num_attention_heads=recipe.num_attention_heads,
        intermediate_size=4 * recipe.hidden_size,
        initializer_range=recipe.initializer_range,
        layer_norm_eps=1e-6,  # DINO's; the library's default is 1e-12
    )
    backbone = ViTModel(config, add_pooling_layer=False)
    for index, layer in enumerate(backbone.layers):
        rate = drop_path * index / max(recipe.num_hidden_layers - 1, 1)
        if rate > 0:
            layer.attention.register_forward_hook(partial(_drop_path, rate=rate))
            layer.mlp.register_forward_hook(partial(_drop_path, rate=rate))
    return backbone


def cls_token(backbone: ViTModel, images: Tensor) -> Tensor:
    """The [CLS] token after the last LayerNorm: images (B, 3, H, W) -> (B, D).

    H and W are any multiples of the patch size: position embeddings are interpolated (bicubic) where they differ from
    the size the backbone was built for.
    """
    return backbone(pixel_values=images, interpolate_pos_encoding=True).last_hidden_state[:, 0]


def _drop_path(module: nn.Module, _inputs: Any, output: Any, *, rate: float) -> Any:
    # A forward hook on a residual branch: drops it for whole samples and rescales the rest (Huang et al., 2016).
    if not module.training:
        return output
    branch, *others = output if isinstance(output, tuple) else (output,)
    keep = torch.rand(branch.shape[0], *(1,) * (branch.ndim - 1), device=branch.device) >= rate
    branch = branch * keep.to(branch.dtype) / (1 - rate)
    return (branch, *others) if isinstance(output, tuple) else branch
