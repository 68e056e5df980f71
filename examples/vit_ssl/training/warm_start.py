"""Starting a pretraining from networks of an earlier one: a backbone that transformers opens, a head of vmf_heads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn
from transformers import ViTModel

from methods.method import Method
from storage.checksums import CHECKSUMS, check_checksums
from vmf_heads.head import find_head
from vmf_heads.hub import PretrainedHead

__all__ = ["start_from"]


def start_from(method: Method, backbone: str | None = None, head: str | None = None) -> None:
    """Give student and teacher the weights of `backbone` and `head`; call it before they are wrapped or attached.

    `backbone` is a folder or a name on the hub of a `ViTModel`, such as the backbone/ of a run. `head` is a folder or a
    name on the hub that `PretrainedHead` reads, such as heads/teacher of a run; its centre becomes the loss's where
    that averages probabilities. Of iBOT's head it is the part for [CLS], which with `shared_head` is all of it. Both
    networks start from the same weights, as they do without.

    Raises:
        ValueError: the shapes are not those of the recipe, or weights are missing; the message names the first.
        UnreadableFile: a file in a folder that has checksums is not the one that was written.
        FileNotFoundError, OSError: there is nothing of that name.
    """
    for folder in (Path(source) for source in (backbone, head) if source is not None):
        if (folder / CHECKSUMS).is_file():
            check_checksums(folder)
    if backbone is not None:
        model, info = ViTModel.from_pretrained(backbone, add_pooling_layer=False, output_loading_info=True)
        if missing := sorted(name for name in info["missing_keys"] if not name.endswith("mask_token")):
            raise ValueError(
                f"`init_backbone` (={backbone!r}) must hold the weights of a ViTModel; it lacks {missing[0]}"
            )
        for network in (method.student, method.teacher):
            _load(network.backbone, model.state_dict(), f"`init_backbone` (={backbone!r})")
    if head is not None:
        pretrained, name = PretrainedHead.from_pretrained(head), f"`init_head` (={head!r})"
        mlp = pretrained.head.get_submodule(pretrained.head.MLP_NAME).state_dict()
        for network in (method.student, method.teacher):
            own = find_head(network)
            _load(own.get_submodule(own.MLP_NAME), mlp, name)
            _load(own.last_layer, pretrained.head.last_layer.state_dict(), name)
        state = method.loss.state_dict()
        if pretrained.log_center is not None and "log_center" in state:
            method.loss.load_state_dict({**state, "log_center": pretrained.log_center})


def _load(module: nn.Module, found: Mapping[str, Tensor], name: str) -> None:
    """Load `found` into `module`; what only pretraining has, iBOT's mask token, stays as it is."""
    wanted = {key: value.shape for key, value in module.state_dict().items() if not key.endswith("mask_token")}
    shapes = {key: value.shape for key, value in found.items() if not key.endswith("mask_token")}
    for key in sorted(wanted.keys() | shapes.keys()):
        if wanted.get(key) != shapes.get(key):
            here, there = (tuple(s[key]) if key in s else "missing" for s in (wanted, shapes))
            raise ValueError(
                f"{name} must have the shapes of the recipe, in which {key} is {here}; there it is {there}"
            )
    module.load_state_dict({key: found[key] for key in wanted}, strict=False)
