"""What a step needs besides its algorithm: random numbers, a batch on the device, and a look at its numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from config.recipe import Recipe
from data.views import finished
from runtime.distributed import device, rank


def to_device(batch: Mapping[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    """Return the tensors of a batch on this process' device, with the changes made that its crops still wait for."""
    moved = {
        name: tensors if name == "changes" else [x.to(device(), non_blocking=True) for x in tensors]
        for name, tensors in batch.items()
    }
    return finished(moved)


def check_statistics(statistics: dict[str, float], recipe: Recipe) -> None:
    """Raise FloatingPointError, with what to try, when the loss or anything else of a step is not finite."""
    wrong = [name for name, value in statistics.items() if not math.isfinite(value)]
    if wrong:
        raise FloatingPointError(
            f"the {wrong[0]} is {statistics[wrong[0]]}; start a new run with a smaller `lr` (={recipe.lr}), a longer "
            f"warm-up, gradient clipping (`clip_grad`, now {recipe.clip_grad}) or `precision` float32"
        )


def seed_step(seed: int, step: int) -> None:
    """Seed what a step draws on its device, drop path alone, so that no generator has a state to be saved."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank()]).generate_state(1, np.uint64)[0]))
