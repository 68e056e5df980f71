"""The teacher's temperature by epoch, of DINO and iBOT."""

from __future__ import annotations

import numpy as np

from .._checks import at_least, positive


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
