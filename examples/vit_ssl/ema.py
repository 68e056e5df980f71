"""The teacher as an exponential moving average (EMA) of the student."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, in place, for parameters and floating-point buffers.

    Other buffers, such as the step counter of a BatchNorm, cannot be averaged and are copied. Raises ValueError when
    the two do not hold the same tensors, by number and shape.
    """
    ours = [*teacher.parameters(), *teacher.buffers()]
    theirs = [*student.parameters(), *student.buffers()]
    if [t.shape for t in ours] != [s.shape for s in theirs]:
        raise ValueError(
            "`teacher` and `student` must hold parameters and buffers of the same shapes in the same order"
        )
    for target, source in zip(ours, theirs, strict=True):
        if target.is_floating_point():
            target.lerp_(source, 1 - momentum)
        else:
            target.copy_(source)
