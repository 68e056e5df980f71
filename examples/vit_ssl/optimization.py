"""What DINO does to gradients and parameters besides AdamW: weight decay groups and clipping."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def parameter_groups(student: nn.Module) -> list[dict[str, Any]]:
    """DINO's two groups: biases and 1-D parameters are not decayed; `weight_g` (K, 1) is, as in DINO."""
    trained = [(name, parameter) for name, parameter in student.named_parameters() if parameter.requires_grad]
    plain = [parameter for name, parameter in trained if name.endswith(".bias") or parameter.ndim == 1]
    decayed = [parameter for name, parameter in trained if not (name.endswith(".bias") or parameter.ndim == 1)]
    return [{"params": decayed, "decayed": True}, {"params": plain, "decayed": False}]


def clip_gradients(student: nn.Module, largest: float) -> Tensor:
    """Clip the gradient norm of each parameter on its own, as DINO does; returns the norm of all before clipping."""
    gradients = [parameter.grad for parameter in student.parameters() if parameter.grad is not None]
    norms = torch.stack([gradient.norm() for gradient in gradients])
    if largest > 0:
        for gradient, factor in zip(gradients, (largest / (norms + 1e-6)).clamp(max=1), strict=True):
            gradient.mul_(factor)
    return norms.norm()
