"""The loss of few rows with all their logits in memory, for torch.compile, which makes few passes of all operations.

Everything is (K, rows) in memory: MKL makes such logits faster than (rows, K), and the products with them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from ._distillation import NO_SECOND_DERIVATIVE, Distillation, Wanted
from ._matmul import without_autocast
from ._once import once_differentiable
from ._weight_normed import WeightNormed

_SUMMED_AT_ONCE = 64


def is_at_once(d: Distillation, rows: int, device: torch.device) -> bool:
    """Whether the loss of so many student rows is made at once: on a CPU, where torch.compile traces, and of few rows.

    They are few if all rows of student and teacher fit twice into the memory of a chunk. With more, chunks that stay in
    a cache are as fast.
    """
    compiled_here = torch.compiler.is_compiling() and device.type == "cpu" and d.students.ranks == 1
    return compiled_here and 2 * (rows + len(d.teacher.features)) <= d.chunk_rows


class CrossEntropyAtOnce(Function):
    """The same as `ChunkedCrossEntropy`: (loss, log_sum) of student features, directions and scales.

    The products of the gradients wait for the backward pass, where the gradient that arrives is a factor of their
    narrow operands.
    """

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, v: Tensor, scales: Tensor | None, d: Distillation, wanted: Wanted
    ) -> tuple[Tensor, Tensor]:
        teacher = WeightNormed(d.teacher.directions, d.teacher.scales, None)
        logits = _logits(teacher, d.teacher.features, d.teacher_temperature, d.statistics_bias)
        centred = logits - logits.amax(dim=0)
        log_sum = (centred - _sum(centred.exp()).log()).logsumexp(dim=1)

        targets, divisor = _exponentials(logits if d.target_bias is None else logits + d.target_bias[:, None])
        if d.teacher_rows is None:
            weight = y.new_ones(len(y)) if d.weights is None else d.weights[:, 0].to(y.dtype)
            targets = targets * (weight / divisor)
        else:
            of_pairs = _weights_of_pairs(d.teacher_rows, d.weights, divisor)
            weight, targets = of_pairs.sum(dim=1), targets @ (of_pairs / divisor).t()

        centred = _logits(WeightNormed(v, scales, None), y, d.student_temperature, d.bias)
        centred = centred - centred.amax(dim=0)
        exponentials = centred.exp()
        divisor = _sum(exponentials)
        loss = (weight * divisor.log() - _sum(targets * centred)).sum()
        difference = exponentials * (weight / divisor) - targets
        ctx.save_for_backward(difference, y, v, scales, d.bias_slope)
        ctx.mark_non_differentiable(log_sum)
        ctx.wanted, ctx.temperature = wanted, d.student_temperature
        return loss, log_sum

    @staticmethod
    @once_differentiable(NO_SECOND_DERIVATIVE)
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        difference, y, v, scales, slope = ctx.saved_tensors
        # Autocast that is on around the compiled call is also on where its backward pass is traced.
        with without_autocast(y.device):
            w, factor = WeightNormed(v, scales, None), grad / ctx.temperature
            along_w = None if slope is None else difference.sum(dim=1) * slope * grad
            dv, dscales = w.gradients_(difference @ (y * factor), along_w, ctx.wanted[1:])
            dy = (difference.t() if w.factor is None else difference.t() * w.factor) @ v * factor
        return dy if ctx.wanted[0] else None, dv, dscales, None, None


def _logits(w: WeightNormed, y: Tensor, temperature: float, bias: Tensor | None) -> Tensor:
    """<w, y> / temperature + bias (K, c).

    Divided after the product: Inductor makes a bias right behind a product part of it, and copies it to all rows first.
    """
    factor = 1 / temperature
    logits = (w.v @ y.t()) * (factor if w.factor is None else (w.factor * factor)[:, None])
    return logits if bias is None else logits + bias[:, None]


def _exponentials(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(K, c) numbers and (c,) divisors: the softmax over K of logits (K, c) is their quotient."""
    exponentials = (logits - logits.amax(dim=0)).exp()
    return exponentials, _sum(exponentials)


def _sum(x: Tensor) -> Tensor:
    """The sums over K of (K, c), in parts: one by one, small numbers would be lost in a sum that has grown."""
    if missing := -len(x) % _SUMMED_AT_ONCE:
        x = F.pad(x, (0, 0, 0, missing))
    # The function: torch.compile cannot trace the method under a `torch.device` context or torch.set_default_device.
    return torch.unflatten(x, 0, (-1, _SUMMED_AT_ONCE)).sum(dim=1).sum(dim=0)


def _weights_of_pairs(teacher_rows: Tensor, weights: Tensor | None, like: Tensor) -> Tensor:
    """(Ns, Nt), in the dtype of `like` (Nt,): what each pair counts, summed where it occurs twice."""
    weights = like.new_ones(teacher_rows.shape) if weights is None else weights.to(like.dtype)
    result = like.new_zeros(len(teacher_rows), len(like))
    return result.scatter_add(1, teacher_rows.clamp(min=0), weights.masked_fill(teacher_rows < 0, 0))
