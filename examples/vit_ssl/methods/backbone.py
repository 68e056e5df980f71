"""The network that is pretrained: a ViTModel of transformers with DINO's stochastic depth, or a ResNetModel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, ResNetConfig, ResNetModel, ViTConfig, ViTModel

from config.backbone import resnet_stages
from config.recipe import Recipe


def build_backbone(recipe: Recipe, *, drop_path: float = 0.0) -> PreTrainedModel:
    """Return the randomly initialised backbone of a recipe; weights are drawn from torch's global generator."""
    return build_vit(recipe, drop_path=drop_path) if recipe.backbone == "vit" else build_resnet(recipe)


def build_resnet(recipe: Recipe) -> ResNetModel:
    """Return a ResNet of basic blocks, each of two convolutions, with equally many in every stage.

    Widths double from stage to stage, so that 8 layers of `hidden_size` 512 and `patch_size` 32 are ResNet-18.
    """
    stages = resnet_stages(recipe.patch_size)
    widths = [recipe.hidden_size // 2**halvings for halvings in reversed(range(stages))]
    config = ResNetConfig(
        embedding_size=widths[0],
        hidden_sizes=widths,
        depths=[recipe.num_hidden_layers // stages] * stages,
        layer_type="basic",
        # transformers keeps these two, but does not use them: they say how others get the same features.
        image_size=recipe.image_size,
        feature_grid=recipe.feature_grid,
    )
    return ResNetModel(config)


def build_vit(recipe: Recipe, *, drop_path: float = 0.0, mask_token: bool = False) -> ViTModel:
    """Return a randomly initialised ViT without pooler; weights are drawn from torch's global generator.

    `drop_path` is the rate of the last layer, rising linearly from 0 at the first, as in DINO's student (its teacher
    has none). It adds no parameters and no names: the state dict and `save_pretrained` are those of a plain ViTModel.
    `mask_token` adds iBOT's, zeros at first, and draws nothing: all other weights are the same with and without it.
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
    backbone = ViTModel(config, add_pooling_layer=False, use_mask_token=mask_token)
    add_drop_path(backbone.layers, drop_path)
    return backbone


def features(backbone: PreTrainedModel, images: Tensor, *, keep: Tensor | None = None) -> Tensor:
    """Return what DINO's and MSN's heads take: the [CLS] token of a ViT, the pooled map of a ResNet.

    Images (B, 3, H, W) -> (B, D). `keep` (B, n) int64 are the patches that are seen: for a ViT as in `tokens`; for a
    ResNet parts of the images in its `feature_grid`, numbered row by row, and the others are blank.
    """
    if not isinstance(backbone, ResNetModel):
        return cls_token(backbone, images, keep=keep)
    if keep is None:
        return pooled(backbone, images)
    grid = backbone.config.feature_grid
    hidden = torch.ones(len(images), grid * grid, dtype=torch.bool, device=images.device).scatter(1, keep, False)
    return pooled(backbone, blanked(images, hidden))


def blanked(images: Tensor, hidden: Tensor) -> Tensor:
    """Return images (B, 3, H, W) with the mean colour of ImageNet, 0, where `hidden` (B, g * g) bool says so.

    This stands for masks where a network cannot leave out patches, as in masked siamese ConvNets (Jing et al., 2022).
    """
    grid = math.isqrt(hidden.shape[1])
    seen = (~hidden).to(images.dtype).unflatten(1, (1, grid, grid))
    return images * F.interpolate(seen, images.shape[-2:])  # "nearest", so that a pixel is seen or is not


def parts(backbone: ResNetModel, images: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Return a ResNet's counterpart of `tokens`: images (B, 3, H, W) -> (B, 1 + g * g, D), g being its `feature_grid`.

    The first is `pooled`, the means over all parts of the last feature map, side by side. Each other token is the mean
    over one part alone: the same vector with zeros for all other parts, so that one head reads both. The parts of the
    images that `mask` (B, g * g) bool hides are blank.
    """
    whole = pooled(backbone, images if mask is None else blanked(images, mask))
    count = backbone.config.feature_grid**2
    by_part = whole.unflatten(1, (-1, count))  # (B, C, g * g)
    alone = by_part.unsqueeze(1) * torch.eye(count, device=whole.device, dtype=whole.dtype)[:, None]
    return torch.cat([whole.unsqueeze(1), alone.flatten(2)], dim=1)


def pooled(backbone: PreTrainedModel, images: Tensor) -> Tensor:
    """Return the features of a convolutional network of transformers: images (B, 3, H, W) -> (B, D).

    These are its pooled output. Where its configuration has a `feature_grid` g > 1, they are the means over g x g parts
    of the last feature map, (C, g, g) flattened: what is where in an image is then part of them.
    """
    output = backbone(pixel_values=images)
    grid = getattr(backbone.config, "feature_grid", 1)
    if grid == 1:
        return output.pooler_output.flatten(1)
    return F.adaptive_avg_pool2d(output.last_hidden_state, grid).flatten(1)


def blocks(backbone: PreTrainedModel) -> list[nn.Module]:
    """Return the residual blocks of a backbone, in their order."""
    if isinstance(backbone, ResNetModel):
        return [block for stage in backbone.encoder.stages for block in stage.layers]
    return list(backbone.layers)


def tokens(backbone: ViTModel, images: Tensor, *, mask: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
    """Return the [CLS] and patch tokens after the last LayerNorm: images (B, 3, H, W) -> (B, 1 + N, D).

    H and W are any multiples of the patch size: position embeddings are interpolated (bicubic) where they differ from
    the size the backbone was built for. Patches are numbered row by row. `mask` (B, N) bool: those that the mask token
    stands for. Or `keep` (B, n) int64: those that are seen, at their positions; N is then n.
    """
    if keep is None:
        output = backbone(pixel_values=images, bool_masked_pos=mask, interpolate_pos_encoding=True)
        return output.last_hidden_state
    # These are the two halves of ViTModel.forward, with a choice of patches between them.
    hidden = backbone.embeddings(images, interpolate_pos_encoding=True)
    kept = keep.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
    hidden = torch.cat([hidden[:, :1], hidden[:, 1:].gather(1, kept)], dim=1)
    for layer in backbone.layers:
        hidden = layer(hidden)
    return backbone.layernorm(hidden)


def cls_token(backbone: ViTModel, images: Tensor, *, keep: Tensor | None = None) -> Tensor:
    """Return the first of `tokens`, [CLS]: (B, 3, H, W) -> (B, D)."""
    return tokens(backbone, images, keep=keep)[:, 0]


def add_drop_path(layers: Sequence[nn.Module], rate: float) -> None:
    """Add stochastic depth to a transformer's blocks in training mode: `rate` at the last, linearly from 0 at the
    first.
    """
    for index, layer in enumerate(layers):
        of_layer = rate * index / max(len(layers) - 1, 1)
        if of_layer > 0:
            layer.attention.register_forward_hook(partial(_drop_path, rate=of_layer))
            layer.mlp.register_forward_hook(partial(_drop_path, rate=of_layer))


def _drop_path(module: nn.Module, _inputs: Any, output: Any, *, rate: float) -> Any:
    # This forward hook on a residual branch drops it for whole samples and rescales the rest (Huang et al., 2016).
    if not module.training:
        return output
    branch, *others = output if isinstance(output, tuple) else (output,)
    keep = torch.rand(branch.shape[0], *(1,) * (branch.ndim - 1), device=branch.device) >= rate
    branch = branch * keep.to(branch.dtype) / (1 - rate)
    return (branch, *others) if isinstance(output, tuple) else branch
