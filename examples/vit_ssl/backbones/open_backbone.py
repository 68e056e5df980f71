"""A vision transformer by its name or path: AutoModel's, timm's, or an original .pth file."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel, PreTrainedModel

from backbones.position_embeddings import interpolate_as_dino
from backbones.public_checkpoints import open_public_checkpoint
from backbones.timm_models import PREFIX, open_timm_model
from storage.checksums import CHECKSUMS, check_checksums
from storage.torch_file import UnreadableFile

SOURCES = (
    "a folder or hub name that transformers' AutoModel opens, `timm:NAME` for an encoder of timm, or an original "
    "checkpoint (.pth) of DINO, iBOT, MSN, DINOv2 or DINOv3"
)


def open_backbone(source: str, *, key: str = "teacher", heads: int | None = None) -> PreTrainedModel:
    """Open a pretrained vision transformer on the CPU, in float32.

    - `timm:NAME`: an encoder of timm, see `timm_models`;
    - a .pth file: the network under `key`, see `public_checkpoints`. `heads` is its number of attention heads, needed
      for widths other than those of the published models. No code in the file is executed;
    - anything else: a folder or a hub name that `AutoModel` opens, without code of others, too.

    Raises:
        ImportError: timm is asked for and not installed.
        FileNotFoundError: there is nothing of that name.
        ValueError: the file or model is of another kind or incomplete; the message names what is missing.
    """
    if source.startswith(PREFIX):
        return open_timm_model(source.removeprefix(PREFIX))
    if Path(source).is_file():
        return open_public_checkpoint(Path(source), key=key, heads=heads)
    return _open_auto_model(source)


def _open_auto_model(source: str) -> PreTrainedModel:
    if (Path(source) / CHECKSUMS).is_file():  # pretrain.py wrote it; safetensors has no checksums of its own
        check_checksums(Path(source))
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        # A ViT saved without its pooler, which no protocol uses, would get a random one.
        options = {"add_pooling_layer": False} if config.model_type == "vit" else {}
        depth = max(getattr(config, "num_hidden_layers", 1), sum(getattr(config, "depths", None) or [1]))
        if depth > 1000:  # they would be built before weights are missed
            raise ValueError(f"`num_hidden_layers` (={depth}) must be at most 1000")
        model, info = AutoModel.from_pretrained(source, dtype=torch.float32, output_loading_info=True, **options)
    except OSError as error:
        raise FileNotFoundError(f"cannot open {source!r}, expected {SOURCES}: {error}") from error
    except Exception as error:  # whatever files that somebody else made can make of transformers
        raise UnreadableFile(f"a file of {source!r} is damaged or of no model that AutoModel opens: {error}") from error
    if missing := sorted(name for name in info["missing_keys"] if not name.endswith("mask_token")):
        raise ValueError(f"{source!r} lacks weights of {type(model).__name__}: {', '.join(missing)}")
    if wrong := [name for name, value in model.state_dict().items() if not value.isfinite().all()]:
        raise ValueError(f"{source!r} holds weights that are NaN or infinite: {', '.join(wrong)}")
    if config.model_type == "dinov2":
        interpolate_as_dino(model)
    return model
