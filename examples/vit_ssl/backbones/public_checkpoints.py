"""The original checkpoints (.pth) of DINO, iBOT, MSN, DINOv2 and DINOv3 as transformers models."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import Dinov2Model, PreTrainedModel, ViTModel

from backbones.models_of_weights import build_model, load_weights
from backbones.original_names import backbone_weights
from backbones.position_embeddings import interpolate_as_dino
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


def open_public_checkpoint(path: Path, *, key: str = "teacher", heads: int | None = None) -> PreTrainedModel:
    """Return the backbone in a .pth file saved or published by the code of DINO, iBOT, MSN, DINOv2 or DINOv3, on the
    CPU.

    `key` says which network of a training checkpoint; a file that holds one state dict needs none. `heads` is the
    number of attention heads, None: that of the published model of this width. The model interpolates its position
    embeddings as the code that wrote the file does.

    Raises:
        UnreadableFile: the file is damaged, none of PyTorch's, or holds a pickled object that could run code.
        ValueError: the file is no such checkpoint, or weights are missing, unexpected, of the wrong shape, NaN or
            infinite; the message names them.
    """
    content = _read(path)
    weights = backbone_weights(_network(content, key, path))
    if wrong := [name for name, value in weights.items() if not (is_stored(value) and value.is_floating_point())]:
        raise ValueError(f"{str(path)!r} holds something else than floating-point weights: {', '.join(wrong[:5])}")
    try:
        model = build_model(weights, heads=heads)
        load_weights(model, weights)
    except ValueError as error:
        raise ValueError(f"{str(path)!r} cannot be opened: {error}") from error
    # MSN, DINOv2 with registers and DINOv3 do as transformers does.
    if isinstance(model, (ViTModel, Dinov2Model)) and _ALIASES["teacher"] not in content:
        interpolate_as_dino(model)
    return model


def read_network(path: Path, *, key: str = "teacher") -> dict[str, Tensor]:
    """Return the state dict of one network in an original checkpoint, with its heads, without `module.` and
    `backbone.`.
    """
    return _network(_read(path), key, path)


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
