"""The original checkpoints (.pth) of DINO, iBOT and MSN as transformers models."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import ViTConfig, ViTModel

from evaluators.features.position_embeddings import interpolate_as_dino
from storage.torch_file import is_stored, read_torch_file

# Beside tensors, DINO's and iBOT's files hold the command line and, as learning rates, NumPy scalars. The function that
# makes those has moved between NumPy 1 and 2. None of these runs code of the file.
_SCALAR = np.float64(0).__reduce__()[0]
_SAFE = [
    argparse.Namespace,
    np.dtype,
    *(type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64)),
    *((_SCALAR, f"numpy.{module}.multiarray.scalar") for module in ("core", "_core")),
]
# These are MSN's names for what the others call teacher and student.
_ALIASES = {"teacher": "target_encoder", "student": "encoder"}
_PREFIXES = ("module.", "backbone.")
# Projection and classification heads and iBOT's mask token are used by no evaluation.
_NOT_BACKBONE = ("head.", "head2.", "fc.", "pred.", "masked_embed", "mask_token")
_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}  # attention heads of ViT-Ti, S, B, L and H, by width


def open_public_checkpoint(path: Path, *, key: str = "teacher", heads: int | None = None) -> ViTModel:
    """Return the backbone in a .pth file saved by DINO's, iBOT's or MSN's code, on the CPU.

    `key` says which network of a training checkpoint; a file that holds one state dict needs none. `heads` is the
    number of attention heads, None: that of the ViT-Ti, S, B, L or H of this width. The model interpolates its position
    embeddings as the code that wrote the file does.

    Raises:
        UnreadableFile: the file is damaged, none of PyTorch's, or holds a pickled object that could run code.
        ValueError: the file is no such checkpoint, or weights are missing, unexpected, of the wrong shape, NaN or
            infinite; the message names them.
    """
    content = _read(path)
    network = _network(content, key, path)
    weights = {name: value for name, value in network.items() if not name.startswith(_NOT_BACKBONE)}
    if wrong := [name for name, value in weights.items() if not (is_stored(value) and value.is_floating_point())]:
        raise ValueError(f"{str(path)!r} holds something else than floating-point weights: {', '.join(wrong[:5])}")
    blocks = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
    if blocks != {str(number) for number in range(len(blocks))}:
        raise ValueError(
            f"the blocks in {str(path)!r} must be numbered from 0, without gaps: {', '.join(sorted(blocks))}"
        )
    if unusable := [name for name in ("pos_embed", "patch_embed.proj.weight") if name not in weights]:
        raise ValueError(f"{str(path)!r} holds no vision transformer of DINO, iBOT or MSN: no {' and '.join(unusable)}")
    ranks = {name: weights[name].ndim for name in ("pos_embed", "patch_embed.proj.weight")}
    if ranks != {"pos_embed": 3, "patch_embed.proj.weight": 4} or not weights["pos_embed"].numel():
        raise ValueError(f"{str(path)!r} holds no vision transformer of DINO, iBOT or MSN: {ranks} dimensions")
    dim, _, patch_size, _ = weights["patch_embed.proj.weight"].shape
    if heads is None and dim not in _HEADS:
        raise ValueError(
            f"`heads` (=None) must be the number of attention heads of the {dim}-wide model in {str(path)!r}"
        )
    side = math.isqrt(weights["pos_embed"].shape[1] - 1)
    config = ViTConfig(
        image_size=side * patch_size,
        patch_size=patch_size,
        hidden_size=dim,
        num_hidden_layers=len(blocks),
        num_attention_heads=heads or _HEADS[dim],
        intermediate_size=len(weights.get("blocks.0.mlp.fc1.bias", range(4 * dim))),
        layer_norm_eps=1e-6,
    )
    try:
        model = ViTModel(config, add_pooling_layer=False)
    except (ValueError, RuntimeError, ArithmeticError) as error:  # heads that do not divide the width, no patches, ...
        raise ValueError(f"the shapes of the weights in {str(path)!r} are those of no ViT: {error}") from error
    if _ALIASES["teacher"] not in content:  # MSN interpolates as transformers does
        interpolate_as_dino(model)
    _load(model, to_transformers(weights), path)
    return model


def read_network(path: Path, *, key: str = "teacher") -> dict[str, Tensor]:
    """Return the state dict of one network in an original checkpoint, with its heads, without `module.` and
    `backbone.`.
    """
    return _network(_read(path), key, path)


def to_transformers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the parameters of DINO's VisionTransformer under the names of ViTModel, with queries, keys and values
    apart.
    """
    renamed = {}
    for name, value in weights.items():
        name = _rename(name)
        if ".qkv." in name:
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                renamed[name.replace("qkv", f"{part}_proj")] = rows
        else:
            renamed[name] = value
    return renamed


def _rename(name: str) -> str:
    if name.startswith("norm."):
        return f"layer{name}"
    for theirs, ours in (
        ("cls_token", "embeddings.cls_token"),
        ("pos_embed", "embeddings.position_embeddings"),
        ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
        ("blocks.", "layers."),
        (".norm1.", ".layernorm_before."),
        (".norm2.", ".layernorm_after."),
        (".attn.qkv.", ".attention.qkv."),
        (".attn.proj.", ".attention.o_proj."),
    ):
        name = name.replace(theirs, ours)
    return name


def _without_prefixes(name: str) -> str:
    while name.startswith(_PREFIXES):
        name = name.split(".", 1)[1]
    return name


def _read(path: Path) -> dict[str, Any]:
    content = read_torch_file(path, safe=_SAFE)
    if not isinstance(content, Mapping):
        raise ValueError(f"{str(path)!r} must hold a dict of state dicts, not a {type(content).__name__}")
    return dict(content)


def _network(content: Mapping[str, Any], key: str, path: Path) -> dict[str, Tensor]:
    names = (key, _ALIASES.get(key, key), "state_dict")
    network = next((content[name] for name in names if isinstance(content.get(name), Mapping)), content)
    if not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in network.items()):
        found = ", ".join(sorted(str(name) for name, value in content.items() if isinstance(value, Mapping))) or "none"
        raise ValueError(f"`key` (={key!r}) must be one of the state dicts in {str(path)!r}: {found}")
    return {_without_prefixes(name): value for name, value in network.items()}


def _load(model: ViTModel, weights: dict[str, Tensor], path: Path) -> None:
    expected = model.state_dict()
    missing = sorted(expected.keys() - weights.keys())
    unexpected = sorted(weights.keys() - expected.keys())
    shapes = [
        f"{name} {tuple(value.shape)}, not {tuple(expected[name].shape)}"
        for name, value in weights.items()
        if name in expected and value.shape != expected[name].shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    if found := [f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names]:
        raise ValueError(f"the weights in {str(path)!r} are not those of a ViT; {'; '.join(found)}")
    if wrong := sorted(name for name, value in weights.items() if not value.isfinite().all()):
        raise ValueError(f"{str(path)!r} holds weights that are NaN or infinite: {', '.join(wrong)}")
    model.load_state_dict(weights)
