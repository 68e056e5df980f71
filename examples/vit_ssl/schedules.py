"""DINO's schedules: one value per training step."""

from __future__ import annotations

import dataclasses

import numpy as np

from config import Recipe


def cosine_schedule(start: float, end: float, steps: int, *, warmup_steps: int = 0) -> np.ndarray:
    """A half cosine from `start` towards `end` after a linear warm-up from 0 to `start`: (steps,) float64.

    As in DINO, the cosine would reach `end` at step `steps`, one after the last.
    """
    warmup = np.linspace(0, start, warmup_steps)
    progress = np.arange(steps - warmup_steps) / max(steps - warmup_steps, 1)
    return np.concatenate([warmup, end + 0.5 * (start - end) * (1 + np.cos(np.pi * progress))])


@dataclasses.dataclass(frozen=True)
class Schedules:
    """What changes from step to step; the teacher's temperature, which changes by epoch, is DINOLoss's."""

    lr: np.ndarray
    weight_decay: np.ndarray
    teacher_momentum: np.ndarray

    @classmethod
    def of(cls, recipe: Recipe, steps_per_epoch: int) -> Schedules:
        """The schedules of a recipe, with the learning rate scaled linearly by batch_size / 256."""
        steps = recipe.epochs * steps_per_epoch
        peak = recipe.lr * recipe.batch_size / 256
        return cls(
            lr=cosine_schedule(peak, recipe.min_lr, steps, warmup_steps=recipe.warmup_epochs * steps_per_epoch),
            weight_decay=cosine_schedule(recipe.weight_decay, recipe.weight_decay_end, steps),
            teacher_momentum=cosine_schedule(recipe.momentum_teacher, 1.0, steps),
        )
