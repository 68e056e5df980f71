import math

import numpy as np
import pytest

from config.recipe import load_recipe
from training.schedules import Schedules, cosine_schedule


def dino_cosine(base: float, final: float, epochs: int, steps_per_epoch: int, warmup_epochs: int = 0) -> list[float]:
    """DINO's scheduler as its paper and code define it, one step at a time."""
    total, warmup = epochs * steps_per_epoch, warmup_epochs * steps_per_epoch
    values = []
    for step in range(total):
        if step < warmup:
            values.append(base * step / (warmup - 1))  # from 0 to `base`, both included
        else:
            progress = (step - warmup) / (total - warmup)
            values.append(final + 0.5 * (base - final) * (1 + math.cos(math.pi * progress)))
    return values


@pytest.mark.parametrize(("base", "final", "warmup_epochs"), [(5e-4, 1e-6, 10), (0.04, 0.4, 0), (0.996, 1.0, 0)])
def test_cosine_schedule_is_dinos(base: float, final: float, warmup_epochs: int) -> None:
    ours = cosine_schedule(base, final, 100 * 7, warmup_steps=warmup_epochs * 7)
    np.testing.assert_allclose(ours, dino_cosine(base, final, 100, 7, warmup_epochs), rtol=1e-12)


def test_a_schedule_may_be_all_warmup() -> None:
    assert cosine_schedule(2.0, 0.0, 3, warmup_steps=3).tolist() == [0.0, 1.0, 2.0]


def test_schedules_of_a_recipe() -> None:
    recipe = load_recipe("photos_dino_vmf", {"batch_size": 64, "lr": 0.004, "epochs": 10, "warmup_epochs": 2})
    schedules = Schedules.of(recipe, steps_per_epoch=5)
    np.testing.assert_allclose(schedules.lr, dino_cosine(0.004 * 64 / 256, recipe.min_lr, 10, 5, 2), rtol=1e-12)
    decay = dino_cosine(recipe.weight_decay, recipe.weight_decay_end, 10, 5)
    np.testing.assert_allclose(schedules.weight_decay, decay, rtol=1e-12)
    momentum = dino_cosine(recipe.momentum_teacher, 1.0, 10, 5)
    np.testing.assert_allclose(schedules.teacher_momentum, momentum, rtol=1e-12)


def test_stretched_schedules_are_cut_off_as_msns() -> None:
    changes = {"epochs": 8, "warmup_epochs": 2, "warmup_start_lr": 2e-4, "schedule_stretch": 1.25}
    recipe = load_recipe("photos_dino_vmf", changes | {"momentum_schedule": "linear", "momentum_teacher": 0.9})
    schedules = Schedules.of(recipe, steps_per_epoch=5)
    peak = recipe.lr * recipe.batch_size / 256
    assert len(schedules.lr) == len(schedules.weight_decay) == len(schedules.teacher_momentum) == 40
    np.testing.assert_allclose(schedules.lr[:10], np.linspace(2e-4, peak, 10), rtol=1e-12)
    # MSN's public code, per step: cosines over 1.25 x the run after the warm-up, momentum by equal increments.
    progress = (np.arange(10, 40) - 10) / (50 - 10)
    expected = recipe.min_lr + (peak - recipe.min_lr) * 0.5 * (1 + np.cos(np.pi * progress))
    np.testing.assert_allclose(schedules.lr[10:], expected, rtol=1e-12)
    np.testing.assert_allclose(schedules.teacher_momentum, 0.9 + 0.1 / 50 * np.arange(40), rtol=1e-12)
