"""The autograd function of `prototype_cross_entropy`: loss and gradients are finished in the forward pass.

Student logits are linear in the prototypes, so everything is a sum over rows of what a few products with the prototypes
give, and a chunk of rows is forgotten once its share has been added up. W may be given as directions and scales; then
no product needs W itself (`WeightNormed`). What is one number per row, as the sum that a softmax divides by, multiplies
the narrow operand of a product instead of the (c, K) probabilities where it can.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ._compiled import has_values, is_plain_eager
from ._distillation import Distillation, GradientSums, Wanted
from ._once import once_differentiable
from ._row_groups import row_groups
from ._rows_apart import rows_apart
from ._rows_together import groups_together, pairs_together
from ._targets import Targets
from ._weight_normed import WeightNormed


class ChunkedCrossEntropy(Function):
    """(loss, log_sum) of student features (Ns, p), directions (K, p) and scales (K,).

    `wanted` says which of their gradients to make, in the forward pass. Where the prototypes are cut over ranks, v, the
    scales, the bias and log_sum are of this rank's, and their gradients those of the mean of the losses of these ranks.
    """

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, v: Tensor, scales: Tensor | None, d: Distillation, wanted: Wanted
    ) -> tuple[Tensor, Tensor]:
        total = GradientSums(v, wanted, wants_db=d.bias_slope is not None)
        w = WeightNormed(v, scales, d.product_dtype)
        targets = Targets(
            WeightNormed(d.teacher.directions, d.teacher.scales, d.product_dtype),
            d.teacher_temperature,
            d.statistics_bias,
            d.target_bias,
            d.teachers,
            d.chunk_rows,
        )
        loss = _losses(y, w, d, targets, total).sum()
        dv, dscales = (None, None)
        if (dw := total.finished_dw()) is not None:
            along_w = None if total.db is None or d.bias_slope is None else total.db * d.bias_slope
            dv, dscales = w.gradients_(dw, along_w, wanted[1:])
        # With what backward passes have multiplied the gradients by so far.
        ctx.save_for_backward(total.dy, dv, dscales, torch.ones_like(loss))
        ctx.mark_non_differentiable(targets.log_sum)
        ctx.exchange = d.students
        return loss, targets.log_sum

    @staticmethod
    @once_differentiable(
        "a gradient of `prototype_cross_entropy`, or of a loss with fused=True, was taken with create_graph=True, but "
        "it cannot be differentiated again: it was finished in the forward pass. For a gradient penalty or a Hessian "
        "use fused=False, or `prototype_cross_entropy_reference`"
    )
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


def _losses(y: Tensor, w: WeightNormed, d: Distillation, targets: Targets, total: GradientSums) -> Tensor:
    """The weighted losses (Ns,); the gradients are added to `total`.

    Student rows are worked on together with the teacher rows that they are trained towards where it can be seen here
    which those are, and where they are few enough to be in memory together. A GPU's host would have to wait for it.
    Products in half precision take numbers in [-1, 1] only, and together they are as large as the weights.
    """
    if d.teacher_rows is None:
        return pairs_together(y, w, d, targets, total)
    # Of the teacher, whose tensors are detached: under a FakeTensorMode that is what makes real ones fake.
    pairs_are_seen = d.teacher_rows.device.type == "cpu" == w.v.device.type and has_values(d.teacher.directions)
    if pairs_are_seen and d.students.ranks == 1 and w.dtype is None:
        teachers, dim = len(d.teacher.features), w.v.shape[1]
        chunks = row_groups(d.teacher_rows, teachers, most_rows=d.chunk_rows, dim=dim)
        if chunks is not None:
            return groups_together(y, w, d, chunks, targets, total)
    return rows_apart(y, w, d, targets, total)


def _is_batched(grad: Tensor) -> bool:
    """Whether `grad` stands for several, as under torch.autograd.grad(is_grads_batched=True)."""
    try:
        grad.untyped_storage()
    except NotImplementedError:  # which torch raises for batched tensors alone: they have no storage of their own
        return True
    return False
