"""The names of weights in the code of DINO, iBOT, MSN, DINOv2 and DINOv3, and in transformers.

The first three share one architecture, `ViTModel`. DINOv2 adds layer scale, the gated MLP of its ViT-g and, in half of
its models, register tokens. DINOv3 has these, too, and rotary position embeddings in place of learnt ones.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from torch import Tensor

Weights = Mapping[str, Tensor]
Kind = Literal["ViT", "DINOv2", "DINOv3"]

# Projection and classification heads, which no evaluation of a backbone uses.
_HEADS = ("head.", "head2.", "fc.", "pred.", "dino_head.", "ibot_head.")
# What only pretraining uses: iBOT's mask token, the norm of DINOv3's local crops. Periods and mask are read elsewhere.
_UNUSED = re.compile(r"masked_embed|local_cls_norm\..*|rope_embed\.periods|.*\.bias_mask")
# What the original code holds in one matrix: queries, keys and values, and both inputs of DINOv2's gated MLP.
_JOINT = {
    ".attn.qkv.": (".attention.q_proj.", ".attention.k_proj.", ".attention.v_proj."),
    ".mlp.w12.": (".mlp.gate_proj.", ".mlp.up_proj."),
}
_SHARED = ((r"^cls_token$", "embeddings.cls_token"), (r"\.attn\.proj\.", ".attention.o_proj."))
_LEARNT_POSITIONS = (
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^norm\.", "layernorm."),
)
_LAYER_SCALE = ((r"\.ls(\d)\.gamma$", r".layer_scale\1.lambda1"),)
_NAMES: dict[Kind, tuple[tuple[str, str], ...]] = {
    "ViT": (
        *_SHARED,
        *_LEARNT_POSITIONS,
        (r"^blocks\.", "layers."),
        (r"\.norm1\.", ".layernorm_before."),
        (r"\.norm2\.", ".layernorm_after."),
    ),
    "DINOv2": (
        *_SHARED,
        *_LEARNT_POSITIONS,
        *_LAYER_SCALE,
        (r"^blocks\.", "encoder.layer."),
        (r"^(mask_token|register_tokens)$", r"embeddings.\1"),
        (r"\.mlp\.w3\.", ".mlp.down_proj."),
    ),
    "DINOv3": (
        *_SHARED,
        *_LAYER_SCALE,
        (r"^blocks\.", "model.layer."),
        (r"^mask_token$", "embeddings.mask_token"),
        (r"^storage_tokens$", "embeddings.register_tokens"),
        (r"^patch_embed\.proj\.", "embeddings.patch_embeddings."),
        (r"\.mlp\.w1\.", ".mlp.gate_proj."),
        (r"\.mlp\.(fc1|w2)\.", ".mlp.up_proj."),
        (r"\.mlp\.(fc2|w3)\.", ".mlp.down_proj."),
    ),
}


def kind_of(weights: Weights) -> Kind:
    """Return which of the three architectures has weights of these names."""
    if "rope_embed.periods" in weights:
        return "DINOv3"
    return "DINOv2" if "blocks.0.ls1.gamma" in weights else "ViT"


def backbone_weights(network: Weights) -> dict[str, Tensor]:
    """Return the weights of the backbone in a state dict, under the names of the published files, without heads.

    DINOv2 trains its blocks in chunks, where `blocks.1.7.norm1.weight` is of block 7.
    """
    weights = {
        re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", name): value
        for name, value in network.items()
        if not name.startswith(_HEADS)
    }
    if kind_of(weights) == "ViT":
        weights.pop("mask_token", None)  # which `ViTModel` does not have
    return weights


def to_transformers(weights: Weights) -> dict[str, Tensor]:
    """Return `backbone_weights` under the names of transformers, with queries, keys and values apart.

    Raises ValueError where a matrix does not hold as many parts as its name says.
    """
    # DINOv3's keys have no bias: the original code has one, and a mask that sets it to 0.
    no_bias = {
        name.replace(".attn.qkv.bias_mask", ".attention.k_proj.bias") for name in weights if name.endswith("bias_mask")
    }
    renamed = {}
    for name, value in _apart(weights).items():
        if _UNUSED.fullmatch(name) or name in no_bias:
            continue
        for theirs, ours in _NAMES[kind_of(weights)]:
            name = re.sub(theirs, ours, name)
        renamed[name] = value
    if kind_of(weights) == "DINOv3" and "embeddings.mask_token" in renamed:
        renamed["embeddings.mask_token"] = renamed["embeddings.mask_token"].unsqueeze(0)  # (1, 1, D)
    return renamed


def _apart(weights: Weights) -> dict[str, Tensor]:
    """Cut the matrices that hold several; the parts are views."""
    cut: dict[str, Tensor] = {}
    for name, value in weights.items():
        joint = next((joint for joint in _JOINT if joint in name and not name.endswith("mask")), None)
        if joint is None:
            cut[name] = value
            continue
        parts = _JOINT[joint]
        if value.ndim == 0 or len(value) % len(parts):
            raise ValueError(f"{name} (of shape {tuple(value.shape)}) must hold {len(parts)} parts of the same size")
        cut |= {name.replace(joint, part): rows for part, rows in zip(parts, value.chunk(len(parts)), strict=True)}
    return cut
