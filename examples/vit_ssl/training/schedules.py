"""The schedules of DINO and MSN: one value per training step."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from config.recipe import Recipe


def cosine_schedule(
    start: float, end: float, steps: int, *, warmup_steps: int = 0, warmup_start: float = 0.0
) -> np.ndarray:
    """Return a half cosine from `start` towards `end` after a linear warm-up from `warmup_start`: (steps,) float64.

    As in DINO, the cosine would reach `end` at step `steps`, one after the last.
    """
    warmup = np.linspace(warmup_start, start, warmup_steps)
    progress = np.arange(steps - warmup_steps) / max(steps - warmup_steps, 1)
    return np.concatenate([warmup, end + 0.5 * (start - end) * (1 + np.cos(np.pi * progress))])


class StepValues(NamedTuple):
    """What the schedules say about one step."""

    lr: float
    weight_decay: float
    teacher_momentum: float


@dataclasses.dataclass(frozen=True)
class Schedules:
    """What changes from step to step; the teacher's temperature, which changes by epoch, is the loss's."""

    lr: np.ndarray
    weight_decay: np.ndarray
    teacher_momentum: np.ndarray

    @classmethod
    def of(cls, recipe: Recipe, steps_per_epoch: int) -> Schedules:
        """Return the schedules of a recipe, with the learning rate scaled linearly by batch_size / 256.

        They are made for `schedule_stretch` times as many steps as there are, so that a stretched one is cut off.
        """
        steps = recipe.epochs * steps_per_epoch
        stretched = int(recipe.schedule_stretch * steps)
        lr = cosine_schedule(
            recipe.lr * recipe.batch_size / 256,
            recipe.min_lr,
            stretched,
            warmup_steps=recipe.warmup_epochs * steps_per_epoch,
            warmup_start=recipe.warmup_start_lr,
        )
        decay = cosine_schedule(recipe.weight_decay, recipe.weight_decay_end, stretched)
        if recipe.momentum_schedule == "linear":
            momentum = np.linspace(recipe.momentum_teacher, 1.0, stretched, endpoint=False)
        else:
            momentum = cosine_schedule(recipe.momentum_teacher, 1.0, stretched)
        return cls(lr=lr[:steps], weight_decay=decay[:steps], teacher_momentum=momentum[:steps])

    def at(self, step: int) -> StepValues:
        """Return the values of one step of the run."""
        return StepValues(float(self.lr[step]), float(self.weight_decay[step]), float(self.teacher_momentum[step]))
