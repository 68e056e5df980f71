"""Starting a pretraining from networks of an earlier one: a published backbone, a head of vmf_heads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from backbones.open_backbone import open_backbone
from data.images import Images
from data.loading import load_steps
from data.stream import ImageStream
from methods.backbone import features
from methods.method import Method
from runtime.distributed import gather_rows, group_of_one, is_main, world_size
from storage.checksums import CHECKSUMS, check_checksums
from training.step import to_device
from vmf_heads.head import find_head
from vmf_heads.hub import PretrainedHead
from vmf_heads.mixture import MixtureFit, warm_start_

__all__ = ["fit_head", "start_from"]

CROPS_PER_PROTOTYPE = 32
MOST_CROPS = 2**20


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


def fit_head(
    method: Method, images: Images | ImageStream, output: Path, *, num_workers: int, **options: Any
) -> MixtureFit:
    """Make both heads the mixture that fits the backbone's features of the first global crops that training will see.

    Call it before the networks are wrapped; every process must call it. See `vmf_heads.mixture.warm_start_`: the MLP
    begins as a projection onto principal directions, and kappa with a median of 1 / `student_temp`. Of iBOT's head it
    is the part for [CLS]. All processes get the same head, and with any number of them it is the same to rounding.
    `options` replace those of `warm_start_`. Prototypes by online EM begin with the same fit, behind the MLP that
    `online_em.mlp` names. Returns the fit.
    """
    recipe = method.recipe
    features = _global_crops(method, images, output, num_workers)
    student = find_head(method.student)
    mlp = "isometric" if recipe.online_em is None else recipe.online_em.mlp
    options = {"median_kappa": 1 / recipe.student_temp, "seed": recipe.seed % 2**62, "mlp": mlp} | options
    fit = warm_start_(student, features, temperature=recipe.student_temp, process_group=group_of_one(), **options)
    if method.mixture is not None:
        method.mixture.start_(fit.mixture)
        method.mixture.write_(student)
    if world_size() > 1:
        for tensor in (*student.parameters(), *student.buffers()):
            dist.broadcast(tensor.data, src=0)  # whatever the processors of other machines round
    method.teacher.load_state_dict(method.student.state_dict())
    if is_main():
        kappa = fit.mixture.kappa
        print(
            f"the head begins as a mixture of {len(kappa)} components, fitted to {len(features)} crops with a median "
            f"kappa of {kappa.median():.0f}"
        )
    return fit


@torch.no_grad()
def _global_crops(method: Method, images: Images | ImageStream, output: Path, num_workers: int) -> Tensor:
    """The [CLS] tokens (N, D) of the first two global crops of the images of the first steps, in their order."""
    recipe = method.recipe
    wanted = min(CROPS_PER_PROTOTYPE * recipe.out_dim, MOST_CROPS)
    steps = math.ceil(wanted / (2 * recipe.batch_size))
    per_epoch = len(images) // recipe.batch_size
    found = []
    for epoch in range(math.ceil(steps / per_epoch)):
        end = min(per_epoch, steps - epoch * per_epoch)
        for (batch,) in load_steps(images, recipe, epoch, 0, end, output, accumulate=1, num_workers=num_workers):
            crops = to_device(batch)["crops"][:2]
            found.append(torch.stack([features(method.teacher.backbone, crop) for crop in crops], dim=1))
    own = torch.stack(found)  # (steps, images of this process, 2, D)
    return gather_rows(own.flatten()).unflatten(1, own.shape).transpose(0, 1).flatten(0, 3)
