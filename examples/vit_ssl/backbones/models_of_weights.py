"""The model of transformers that fits weights of DINO, iBOT, MSN, DINOv2 or DINOv3."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    PreTrainedModel,
    ViTConfig,
    ViTModel,
)

from backbones.original_names import Weights, kind_of, to_transformers

_NAMES = "DINO, iBOT, MSN, DINOv2 or DINOv3"
# Attention heads by width, of ViT-Ti, S, B, L and H and of DINOv2's ViT-g. DINOv3 saves what tells them.
_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1536: 24}
# What is published beside vision transformers, and how names in it begin.
_OTHERS = {
    "cls_attn_blocks.": "an XCiT",
    "layer1.0.": "a ResNet",
    "layers.0.blocks.": "a Swin transformer",
    "stages.0.": "a ConvNeXt",
}


def build_model(weights: Weights, *, heads: int | None = None) -> PreTrainedModel:
    """Return the model that `backbone_weights` fit, untrained; its kind and its sizes follow from names and shapes.

    `heads` is the number of attention heads, None: that of the published model of this width.

    Raises ValueError where these are not the weights of a vision transformer; the message says what they are.
    """
    if other := next((what for begin, what in _OTHERS.items() if any(n.startswith(begin) for n in weights)), None):
        raise ValueError(f"these are the weights of {other}, not of a vision transformer with [CLS] and patch tokens")
    blocks = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
    if blocks != {str(number) for number in range(len(blocks))}:
        raise ValueError(f"the blocks must be numbered from 0, without gaps: {', '.join(sorted(blocks))}")
    kind = kind_of(weights)
    ranks = {"patch_embed.proj.weight": 4} | ({"rope_embed.periods": 1} if kind == "DINOv3" else {"pos_embed": 3})
    if missing := [name for name in ranks if name not in weights]:
        raise ValueError(f"this is no vision transformer of {_NAMES}: no {' and '.join(missing)}")
    if any(weights[name].ndim != rank or not weights[name].numel() for name, rank in ranks.items()):
        shapes = ", ".join(f"{name} {tuple(weights[name].shape)}" for name in ranks)
        raise ValueError(f"this is no vision transformer of {_NAMES}: {shapes}")
    dim, _, patch_size, _ = weights["patch_embed.proj.weight"].shape
    if heads is None and kind == "DINOv3":
        heads = dim // (4 * len(weights["rope_embed.periods"]))
    if heads is None and dim not in _HEADS:
        raise ValueError(f"`heads` (=None) must be the number of attention heads of the {dim}-wide model")
    sizes = {
        "patch_size": patch_size,
        "hidden_size": dim,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": _HEADS[dim] if heads is None else heads,
    }
    try:
        return {"ViT": _vit, "DINOv2": _dinov2, "DINOv3": _dinov3}[kind](weights, sizes)
    except (ValueError, RuntimeError, ArithmeticError) as error:  # heads that do not divide the width, no patches, ...
        raise ValueError(f"the shapes of the weights are those of no vision transformer: {error}") from error


def load_weights(model: PreTrainedModel, weights: Weights) -> None:
    """Give `model`, which `build_model` made of them, the `backbone_weights`.

    Raises ValueError where weights are missing, unexpected, of another shape, NaN or infinite; it names them.
    """
    renamed = to_transformers(weights)
    check_names(model, renamed)
    if wrong := sorted(name for name, value in renamed.items() if not value.isfinite().all()):
        raise ValueError(f"weights are NaN or infinite: {', '.join(wrong)}")
    model.load_state_dict(renamed)
    if isinstance(model, DINOv3ViTModel):
        periods = weights["rope_embed.periods"]
        if not (periods > 0).all() or len(periods) != len(model.rope_embeddings.inv_freq):
            raise ValueError(
                f"rope_embed.periods (={periods.tolist()}) must be a number > 0 for four columns of a head"
            )
        model.rope_embeddings.inv_freq.copy_(1 / periods.float())


def check_names(model: PreTrainedModel, renamed: Weights) -> None:
    """Raise ValueError unless `to_transformers` has given every weight of `model`, of its shape, and no other."""
    expected = model.state_dict()
    missing = sorted(expected.keys() - renamed.keys())
    unexpected = sorted(renamed.keys() - expected.keys())
    shapes = [
        f"{name} {tuple(value.shape)}, not {tuple(expected[name].shape)}"
        for name, value in renamed.items()
        if name in expected and value.shape != expected[name].shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    if found := [f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names]:
        raise ValueError(f"the weights are not those of a {type(model).__name__}; {'; '.join(found)}")


def _vit(weights: Weights, sizes: dict[str, int]) -> ViTModel:
    dim = sizes["hidden_size"]
    width = _size(weights.get("blocks.0.mlp.fc1.weight"), 0, 4 * dim)
    config = ViTConfig(**sizes, image_size=_image_size(weights), intermediate_size=width, layer_norm_eps=1e-6)
    return ViTModel(config, add_pooling_layer=False)


def _dinov2(weights: Weights, sizes: dict[str, int]) -> PreTrainedModel:
    dim = sizes["hidden_size"]
    gated = "blocks.0.mlp.w12.weight" in weights
    ratio = 4 if gated else _size(weights.get("blocks.0.mlp.fc1.weight"), 0, 4 * dim) // dim
    options: dict[str, Any] = {"image_size": _image_size(weights), "mlp_ratio": ratio, "use_swiglu_ffn": gated}
    if "register_tokens" not in weights:
        return Dinov2Model(Dinov2Config(**sizes, **options))
    registers = _size(weights["register_tokens"], 1, 0)
    return Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sizes, **options, num_register_tokens=registers))


def _dinov3(weights: Weights, sizes: dict[str, int]) -> DINOv3ViTModel:
    gated = "blocks.0.mlp.w1.weight" in weights
    bias = "blocks.0.attn.qkv.bias" in weights
    config = DINOv3ViTConfig(
        **sizes,
        image_size=224,  # at which the evaluations of its authors are
        intermediate_size=_size(weights.get(f"blocks.0.mlp.{'w1' if gated else 'fc1'}.weight"), 0, 1),
        use_gated_mlp=gated,
        hidden_act="silu" if gated else "gelu",
        query_bias=bias,
        key_bias=bias and "blocks.0.attn.qkv.bias_mask" not in weights,
        value_bias=bias,
        num_register_tokens=_size(weights.get("storage_tokens"), 1, 0),
    )
    return DINOv3ViTModel(config)


def _image_size(weights: Weights) -> int:
    """The side in px of the images that the position embeddings are for; the first of them is that of [CLS]."""
    side = math.isqrt(weights["pos_embed"].shape[1] - 1)
    return side * weights["patch_embed.proj.weight"].shape[2]


def _size(value: Tensor | None, dim: int, default: int) -> int:
    """The size along `dim` of a weight that may be missing or of the wrong shape, of which `check_names` will tell."""
    return default if value is None or value.ndim <= dim else value.shape[dim]
