"""Encoders of timm by name, as the models of transformers that have the same weights and give the same tokens."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import Dinov2Model, PreTrainedModel, ViTModel

from backbones.models_of_weights import build_model, load_weights
from backbones.original_names import Weights, kind_of
from backbones.position_embeddings import interpolate_as_dino
from data.photometric import MEAN, STD

PREFIX = "timm:"
# Two implementations differ by rounding; relative to the size of all tokens.
_TOLERANCE = 1e-3


def open_timm_model(name: str) -> PreTrainedModel:
    """Return timm's pretrained encoder `name`, such as "vit_small_patch16_224.dino", on the CPU.

    It must be a plain vision transformer with a [CLS] token, or one with DINOv2's layer scale, registers and gated MLP,
    and expect images normalised as ImageNet's. Whether the tokens are timm's is found out on an image of noise. At
    other resolutions than its own, position embeddings are interpolated as in DINO's and DINOv2's code.

    Raises:
        ImportError: timm is not installed.
        ValueError: timm has no such model, or it is of another architecture; the message says what differs.
    """
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # the latter where torchvision was built for another torch
        raise ImportError(
            f"`{PREFIX}{name}` needs the package `timm`: pip install timm, and a torchvision that fits torch ({error})"
        ) from error
    try:
        theirs = timm.create_model(name, pretrained=True, num_classes=0).eval()
    except Exception as error:  # whatever timm makes of a name, and the network of a download
        raise ValueError(f"timm opens no pretrained model `{name}`: {error}") from error
    config = theirs.pretrained_cfg
    if (tuple(config["mean"]), tuple(config["std"])) != (MEAN, STD):
        raise ValueError(
            f"timm's `{name}` expects images of mean {config['mean']} and deviation {config['std']}; here they have "
            f"ImageNet's, {MEAN} and {STD}"
        )
    try:
        weights = original_weights(theirs.state_dict())
        model = build_model(weights, heads=_heads(theirs)).eval()
        load_weights(model, weights)
    except ValueError as error:
        raise ValueError(f"timm's `{name}` is no vision transformer that opens here: {error}") from error
    _check_tokens(name, theirs, model)
    if isinstance(model, (ViTModel, Dinov2Model)):
        interpolate_as_dino(model)
    return model


def original_weights(state: Weights) -> dict[str, Tensor]:
    """Return the weights of a vision transformer of timm under the names of DINO or DINOv2.

    Where position embeddings are for patches alone, as in DINOv2 with registers, timm has added that of [CLS] to the
    token, and zeros take its place. Of DINOv2 it has no mask token, and calls the gated MLP's matrices fc1 and fc2.
    """
    weights = {name.replace("reg_token", "register_tokens"): value for name, value in state.items()}
    positions = weights.get("pos_embed")
    if positions is not None and positions.ndim == 3 and math.isqrt(positions.shape[1]) ** 2 == positions.shape[1]:
        weights["pos_embed"] = torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)
    if kind_of(weights) == "DINOv2" and "cls_token" in weights:
        weights["mask_token"] = torch.zeros_like(weights["cls_token"][0])
        first, second = (weights.get(f"blocks.0.mlp.{name}.weight") for name in ("fc1", "fc2"))
        if first is not None and second is not None and len(first) == 2 * second.shape[1]:
            names = {".mlp.fc1.": ".mlp.w12.", ".mlp.fc2.": ".mlp.w3."}
            for old, new in names.items():
                weights = {name.replace(old, new): value for name, value in weights.items()}
    return weights


@torch.no_grad()
def _check_tokens(name: str, theirs: Any, model: PreTrainedModel) -> None:
    """Raise ValueError unless both give the same tokens: they may differ in what has no weights."""
    side = model.config.image_size
    image = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    want, got = theirs.forward_features(image), model(pixel_values=image).last_hidden_state
    difference = ((got - want).norm() / want.norm()).item() if got.shape == want.shape else math.inf
    if not difference < _TOLERANCE:
        raise ValueError(
            f"timm's `{name}` is no vision transformer that opens here: with the same weights its tokens "
            f"{tuple(want.shape)} differ by {difference:.1%}"
        )


def _heads(model: Any) -> int | None:
    """The number of attention heads of a model of timm; None if its blocks are of another kind."""
    blocks = getattr(model, "blocks", None)
    attention = getattr(blocks[0], "attn", None) if blocks else None
    heads = getattr(attention, "num_heads", None)
    return heads if isinstance(heads, int) else None
