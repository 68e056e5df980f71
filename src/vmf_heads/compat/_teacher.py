"""The teacher's side that the losses of DINO and iBOT share: temperature schedules, logit centres, names in states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .._checks import at_least, positive
from .._distributed import all_reduce_sum_
from ..centering import ProbabilityCentering

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

CENTERING = ("probability", "logit")


def temperature_schedule(
    warmup: float, final: float, warmup_epochs: int, nepochs: int, *, start_epoch: int = 0, suffix: str = ""
) -> np.ndarray:
    """The teacher's temperature by epoch: `warmup` until `start_epoch`, linear over `warmup_epochs`, then `final`.

    `suffix` is that of the arguments' names in the errors.
    """
    positive(f"warmup_teacher_temp{suffix}", warmup)
    positive(f"teacher_temp{suffix}", final)
    at_least("nepochs", nepochs, 1)
    at_least("mim_start_epoch", start_epoch, 0)
    if not 0 <= warmup_epochs <= nepochs - start_epoch:
        limit = f"`nepochs` (={nepochs})" + (f" - `mim_start_epoch` (={start_epoch})" if start_epoch else "")
        raise ValueError(f"`warmup_teacher_temp_epochs` (={warmup_epochs}) must be in [0, {limit}]")
    return np.concatenate(
        (
            np.full(start_epoch, warmup),
            np.linspace(warmup, final, warmup_epochs),
            np.full(nepochs - warmup_epochs - start_epoch, final),
        )
    )


def temperature_at(schedule: np.ndarray, epoch: int) -> float:
    """The temperature of `epoch`, or an error if training has no such epoch."""
    if not 0 <= epoch < len(schedule):
        raise ValueError(f"`epoch` (={epoch}) must be in [0, `nepochs` (={len(schedule)}))")
    return float(schedule[epoch])


def offset_at(centering: ProbabilityCentering | None, center: Tensor | None, temperature: float) -> Tensor:
    """What the teacher's logits lose before the softmax, (K,): c of Eq. 9, or center / temperature of Eq. 8."""
    if centering is None:
        assert center is not None
        return center.flatten() / temperature
    centering.convert_logit_center_(temperature)
    return centering.log_center


def update_logit_center_(
    center: Tensor, logit_sum: Tensor, rows: int, momentum: float, process_group: ProcessGroup | None
) -> None:
    """One step of Eq. 8 from the sum of the teacher's logits (K,) over `rows` rows, over all ranks."""
    total = torch.cat([logit_sum, logit_sum.new_full((1,), rows)])
    all_reduce_sum_(total, process_group)
    mean = (total[:-1] / total[-1]).view_as(center)
    # torch.where instead of a branch: whether any rank had rows is known on the device only.
    center.copy_(torch.where(total[-1] > 0, center.lerp(mean, 1 - momentum), center))


class LogitSum:
    """The teacher's logits of Eq. 8, summed over micro-batches until their centre makes one step."""

    def __init__(self) -> None:
        self.logit_sum: Tensor | None = None
        self.rows = 0

    def accumulate_(self, logit_sum: Tensor, rows: int) -> None:
        """Add a micro-batch: the sum of its logits (K,) over so many rows."""
        self.logit_sum = logit_sum if self.logit_sum is None else self.logit_sum + logit_sum
        self.rows += rows

    def commit_(self, center: Tensor, momentum: float, process_group: ProcessGroup | None) -> None:
        """One step of `center` from all that was accumulated, over all ranks; each of them must call it."""
        logit_sum = center.new_zeros(center.numel()) if self.logit_sum is None else self.logit_sum
        update_logit_center_(center, logit_sum, self.rows, momentum, process_group)
        self.logit_sum, self.rows = None, 0


def rename_keys_(state: dict[str, Any], prefix: str, names: Mapping[str, str]) -> None:
    """Rename the keys `prefix + old` of a state dict to `prefix + new`, in place, where they exist."""
    for old, new in names.items():
        if prefix + old in state:
            state[prefix + new] = state.pop(prefix + old)
