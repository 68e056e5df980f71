"""The autograd function of `prototype_cross_entropy`: loss and gradients are finished in the forward pass."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ._chunked_operator import chunked_operator, is_an_operator
from ._compiled import is_plain_eager
from ._distillation import NO_SECOND_DERIVATIVE, Distillation, Wanted
from ._loss_and_gradients import loss_and_gradients
from ._once import once_differentiable


class ChunkedCrossEntropy(Function):
    """(loss, log_sum) of student features (Ns, p), directions (K, p) and scales (K,).

    `wanted` says which of their gradients to make, in the forward pass. Where the prototypes are cut over ranks, v, the
    scales, the bias and log_sum are of this rank's, and their gradients those of the mean of the losses of these ranks.
    """

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, v: Tensor, scales: Tensor | None, d: Distillation, wanted: Wanted
    ) -> tuple[Tensor, Tensor]:
        made = (chunked_operator if is_an_operator(v, d) else loss_and_gradients)(y, v, scales, d, wanted)
        # With what backward passes have multiplied the gradients by so far.
        ctx.save_for_backward(made.dy, made.dv, made.dscales, torch.ones_like(made.loss))
        ctx.mark_non_differentiable(made.log_sum)
        ctx.exchange = d.students
        return made.loss, made.log_sum

    @staticmethod
    @once_differentiable(NO_SECOND_DERIVATIVE)
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        *gradients, scale = ctx.saved_tensors
        grad = ctx.exchange.checked_equal(grad)
        if getattr(ctx, "are_handed_out", False) or not is_plain_eager(grad) or _is_batched(grad):
            factor = grad / scale
            return *(g if g is None else g * factor for g in gradients), None, None
        factor = grad.item() if grad.device.type == "cpu" else None  # a GPU's host would have to wait for it
        if factor is not None and (factor == 0 or not math.isfinite(factor)):  # nothing could be made of them again
            return *(g if g is None else g * factor for g in gradients), None, None
        # The first pass, and with retain_graph=False the only one, gives away what the forward pass made, so that there
        # is never a second (K, p) tensor. Whoever gets it may write to it: then a later pass raises.
        ctx.are_handed_out = True
        if factor != 1:
            for g in gradients:
                if g is not None:
                    g.data.mul_(grad)  # `data`: not one of the changes that make a later pass raise
            scale.data.copy_(grad)
        return *gradients, None, None


def _is_batched(grad: Tensor) -> bool:
    """Whether `grad` stands for several, as under torch.autograd.grad(is_grads_batched=True)."""
    try:
        grad.untyped_storage()
    except NotImplementedError:  # which torch raises for batched tensors alone: they have no storage of their own
        return True
    return False
