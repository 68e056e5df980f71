"""What DINO and MSN do to gradients and parameters besides AdamW: decay groups, clipping, a frozen last layer."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.ema import copies, local
from vmf_heads.optim import separate_norms


def parameter_groups(
    student: nn.Module, *, decay_prototypes: bool = True, norms_lr_multiplier: float = 0.0
) -> list[dict[str, Any]]:
    """Return DINO's two parameter groups: biases and 1-D parameters are not decayed; `weight_g` (K, 1) is, as in DINO.

    Without `decay_prototypes`, as in MSN, those of the last layer are not decayed either. With a `norms_lr_multiplier`
    the norms of the prototypes, unless they are frozen, are in a group of their own, which does not decay; the key
    "lr_multiplier" holds what its learning rate is to be multiplied by.
    """
    decayed, plain = [], []
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            excluded = not decay_prototypes and "last_layer" in name
            (plain if excluded or name.endswith(".bias") or parameter.ndim == 1 else decayed).append(parameter)
    groups = [{"params": decayed, "decayed": True}, {"params": plain, "decayed": False}]
    learn = any(name.endswith("last_layer.weight_g") and p.requires_grad for name, p in student.named_parameters())
    if not (norms_lr_multiplier and learn):
        return groups
    return separate_norms(groups, student, lr=1.0, lr_multiplier=norms_lr_multiplier)  # the loop sets all lrs


@torch.no_grad()
def clip_gradients(
    student: nn.Module, largest: float, *, over: Literal["parameter", "network"] = "parameter"
) -> Tensor:
    """Clip the gradient norm of each parameter on its own, as DINO does, or that of the network as one, as MSN does.

    In the second case the prototypes neither count nor are clipped: MSN keeps them beside its network. `largest` 0
    clips nothing. Returns the norm of all gradients before clipping. Where a process holds a part of a gradient, under
    FSDP2 or of prototypes that are shared out, norms are those of whole gradients.
    """
    named = {name: parameter.grad for name, parameter in student.named_parameters() if parameter.grad is not None}
    gradients = list(named.values())
    parts = [local(gradient) for gradient in gradients]
    norms = torch.stack([part.norm() for part in parts])
    if any(part is not gradient for part, gradient in zip(parts, gradients, strict=True)):
        # Different parts are disjoint: their squares add up, but for those that several processes have alike.
        squares = norms.square() / norms.new_tensor([copies(gradient) for gradient in gradients])
        dist.all_reduce(squares)
        norms = squares.sqrt()
    total = norms.norm()
    if largest > 0:
        clipped = norms
        if over == "network":
            inside = norms.new_tensor(["last_layer" not in name for name in named])
            clipped = inside * (inside * norms).norm()
        for part, factor in zip(parts, (largest / (clipped + 1e-6)).clamp(max=1), strict=True):
            part.mul_(factor)
    return total


def drop_last_layer_gradients(student: nn.Module) -> None:
    """Leave the prototypes as they are in this step: AdamW passes over parameters without gradient, decay included."""
    for name, parameter in student.named_parameters():
        if "last_layer" in name:
            parameter.grad = None
