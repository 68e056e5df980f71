"""The teacher as an exponential moving average (EMA) of the student."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from runtime.distributed import world_size


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Set teacher <- momentum * teacher + (1 - momentum) * student in place, parameters and floating-point buffers.

    Other buffers, such as the step counter of a BatchNorm, cannot be averaged and are copied. Under FSDP2, where both
    are cut alike, every process averages its own part. Raises ValueError when the two do not hold the same tensors, by
    number and shape.
    """
    ours = [local(tensor) for tensor in (*teacher.parameters(), *teacher.buffers())]
    theirs = [local(tensor) for tensor in (*student.parameters(), *student.buffers())]
    if [t.shape for t in ours] != [s.shape for s in theirs]:
        raise ValueError(
            "`teacher` and `student` must hold parameters and buffers of the same shapes in the same order"
        )
    for target, source in zip(ours, theirs, strict=True):
        if target.is_floating_point():
            target.lerp_(source, 1 - momentum)
        else:
            target.copy_(source)


def local(tensor: Tensor) -> Tensor:
    """Return this process' part of a tensor that FSDP2 has cut, any other as it is. Changes in place reach it."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def copies(tensor: Tensor) -> int:
    """Return how many processes hold the same as this one of a tensor, whether FSDP2 or something else has cut it."""
    if not hasattr(tensor, "placements"):
        return world_size()
    mesh = tensor.device_mesh
    return world_size() // math.prod(mesh.size(dim) for dim, where in enumerate(tensor.placements) if where.is_shard())
