"""Starting a pretraining from networks of an earlier one: a published backbone, a head of vmf_heads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from backbones.open_backbone import open_backbone
from methods.method import Method
from storage.checksums import CHECKSUMS, check_checksums
from vmf_heads.head import find_head
from vmf_heads.hub import PretrainedHead

__all__ = ["start_from"]


def start_from(method: Method, backbone: str | None = None, head: str | None = None) -> None:
    """Give student and teacher the weights of `backbone` and `head`; call it before they are wrapped or attached.

    `backbone` is whatever `open_backbone` opens as a `ViTModel`: the backbone/ of a run, another folder or a name on
    the hub, `timm:NAME`, a .pth file of DINO, iBOT or MSN. `head` is a folder or a name on the hub that
    `PretrainedHead` reads, such as heads/teacher of a run; its centre becomes the loss's where that averages
    probabilities. Of iBOT's head it is the part for [CLS], which with `shared_head` is all of it. Both networks start
    from the same weights, as they do without.

    Raises:
        ImportError: timm is asked for and not installed.
        ValueError: the shapes are not those of the recipe, or weights are missing; the message names the first.
        UnreadableFile: a file in a folder that has checksums is not the one that was written.
        FileNotFoundError, OSError: there is nothing of that name.
    """
    if head is not None and (Path(head) / CHECKSUMS).is_file():
        check_checksums(Path(head))
    if backbone is not None:
        model, name = open_backbone(backbone), f"`init_backbone` (={backbone!r})"
        for network in (method.student, method.teacher):
            _load(network.backbone, model.state_dict(), name)
            heads, found = (vit.config.num_attention_heads for vit in (network.backbone, model))
            if heads != found:  # which no shape shows
                raise ValueError(f"{name} must have the `num_attention_heads` of the recipe (={heads}), not {found}")
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
