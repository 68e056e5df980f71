"""One optimisation step, the same for every method and strategy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from config.recipe import Recipe
from methods.method import Method
from runtime.distributed import device, rank
from training.ema import ema_update
from training.optimization import clip_gradients, drop_last_layer_gradients
from training.parallel import gradients_shared


def train_step(
    method: Method,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[dict[str, list[Tensor]]],
    epoch: int,
    now: dict[str, float],
    recipe: Recipe,
    bfloat16: bool,
) -> list[dict[str, float | Tensor]]:
    """One step of student, centre and teacher; statistics of each micro-batch, as this process sees them."""
    where, found = device(), []
    for group in optimizer.param_groups:
        group["lr"] = now["lr"]
        group["weight_decay"] = now["weight_decay"] if group["decayed"] else 0.0
    optimizer.zero_grad(set_to_none=True)
    for index, micro_batch in enumerate(micro_batches):
        last = index == len(micro_batches) - 1
        batch = {name: [x.to(where, non_blocking=True) for x in tensors] for name, tensors in micro_batch.items()}
        with gradients_shared(method.student, last):
            with torch.autocast(where.type, torch.bfloat16, enabled=bfloat16):
                loss, statistics = method(batch, epoch, commit=last)
            (loss / len(micro_batches)).backward()
        found.append({"loss": loss.detach(), **statistics})
    grad_norm = clip_gradients(method.student, recipe.clip_grad, over=recipe.clip_grad_over)
    if epoch < recipe.freeze_last_layer_epochs:
        drop_last_layer_gradients(method.student)
    optimizer.step()
    ema_update(method.teacher, method.student, now["teacher_momentum"])
    of_step = method.center_statistics(epoch) | {"grad_norm": grad_norm}
    return [statistics | of_step for statistics in found]


def check_statistics(statistics: dict[str, float], recipe: Recipe) -> None:
    """FloatingPointError, with what to try, when the loss or anything else of a step is not finite."""
    wrong = [name for name, value in statistics.items() if not math.isfinite(value)]
    if wrong:
        raise FloatingPointError(
            f"the {wrong[0]} is {statistics[wrong[0]]}; start a new run with a smaller `lr` (={recipe.lr}), a longer "
            f"warm-up, gradient clipping (`clip_grad`, now {recipe.clip_grad}) or `precision` float32"
        )


def seed_step(seed: int, step: int) -> None:
    """Seed what a step draws on its device, drop path alone, so that no generator has a state to be saved."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank()]).generate_state(1, np.uint64)[0]))
