"""Loss and gradients of `prototype_cross_entropy`, finished chunk by chunk in the forward pass.

Student logits are linear in the prototypes, so a target t and the logits s of a row meet only in

    H(t, s) = logsumexp(s) - sum_k t_k s_k,    sum_k t_k s_k = <sum_k t_k w_k, y> / tau + sum_k t_k b_k

and a chunk of rows gives what the loss and every gradient need of it in a few products (' is the transpose):

    student rows: logits s = Y W'/tau + b, P = softmax(s), P W and P' Y
    teacher rows: targets T, T W (p numbers a row instead of K) and T' Z, Z the weighted sum of the rows they target

Crops that share a target share its products; the statistics for centring come from the same teacher logits.
W may be given as directions and scales; then no product needs W itself (_weight_norm.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ._compiled import is_plain_eager
from ._epilogues import Epilogues
from ._matmul import average, without_autocast
from ._weight_norm import WeightNormed

# The logits of one chunk take at most so many bytes: enough rows to use the prototypes often each time they are read.
_CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 128 * 2**20}

Wanted = tuple[bool, bool, bool, bool]  # of the gradients of features, prototypes, scale and bias


@dataclass(frozen=True)
class Distillation:
    """Everything but the four tensors that carry gradients; names as in `prototype_cross_entropy`."""

    teacher_features: Tensor
    teacher_prototypes: Tensor
    teacher_scale: Tensor | None
    statistics_bias: Tensor | None  # what the statistics' logits have on top of the raw scores: nothing or log C_p
    target_bias: Tensor | None  # what the targets' have on top of those: log C_p - c or -c
    student_temperature: float
    teacher_temperature: float
    targets: Tensor | None
    weights: Tensor | None
    per_row: bool
    chunk_rows: int | None
    product_dtype: torch.dtype | None
    epilogues: Epilogues

    def tensors(self) -> list[Tensor]:
        """All whose changes autograd can see: not those of inference mode. A compiled graph sees to that itself."""
        if torch.compiler.is_compiling():
            return []
        values = (getattr(self, field.name) for field in fields(self))
        return [x for x in values if isinstance(x, Tensor) and not x.is_inference()]


class ChunkedCrossEntropy(Function):
    """(loss, log_sum) of student features (Ns, p), prototypes (K, p), scale (K,) and bias (K,).

    `wanted` says which of their gradients.
    """

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, v: Tensor, scale: Tensor | None, b: Tensor | None, d: Distillation, wanted: Wanted
    ) -> tuple[Tensor, Tensor]:
        ctx.distillation, ctx.wanted = d, wanted
        now = (False, False, False, False) if d.per_row else wanted
        losses, log_sum, gradients = _finish(y, v, scale, b, d, now)
        # Per-row losses meet gradients of their own in the backward pass, which has to start again from the inputs. All
        # are saved, so that autograd reports one that has changed in place until then.
        ctx.save_for_backward(*((y, v, scale, b, *d.tensors()) if d.per_row else gradients))
        ctx.mark_non_differentiable(log_sum)
        return (losses if d.per_row else losses.sum()), log_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.distillation.per_row:
            unscaled = _is_known_to_be_one(grad)  # spares a second (K, p) gradient
            return *(g if g is None or unscaled else g * grad for g in ctx.saved_tensors), None, None
        y, v, scale, b, *_ = ctx.saved_tensors
        d = ctx.distillation
        shape = (len(y), 1) if d.targets is None else d.targets.shape
        weights = grad[:, None].expand(shape) if d.weights is None else d.weights * grad[:, None]
        with without_autocast(grad.device):  # as in the forward pass
            _, _, gradients = _finish(y, v, scale, b, replace(d, weights=weights), ctx.wanted)
        return *gradients, None, None


def _is_known_to_be_one(grad: Tensor) -> bool:
    """Whether the scalar `grad` is 1, where the question is free: not on a GPU, not under a transform."""
    if grad.device.type != "cpu" or not is_plain_eager(grad):
        return False
    try:
        return grad.item() == 1
    except RuntimeError:  # gradients batched by torch.autograd.grad(is_grads_batched=True) have no value to tell
        return False


class _Accumulator:
    """The sums that chunks add to: gradients where `wanted`, and the teacher's statistics."""

    def __init__(self, y: Tensor, v: Tensor, wanted: Wanted) -> None:
        self.dy = torch.zeros_like(y) if wanted[0] else None
        self.dw = torch.zeros_like(v) if wanted[1] or wanted[2] else None
        self.db = v.new_zeros(len(v)) if wanted[3] else None
        self.log_sum = v.new_full((len(v),), -torch.inf)


def _finish(
    y: Tensor, v: Tensor, scale: Tensor | None, b: Tensor | None, d: Distillation, wanted: Wanted
) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
    """The losses (Ns,), log_sum (K,) and the gradients of the summed losses with respect to y, v, scale and b."""
    total = _Accumulator(y, v, wanted)
    w = WeightNormed(v, scale, d.product_dtype)
    teacher = WeightNormed(d.teacher_prototypes, d.teacher_scale, d.product_dtype)
    rows = d.chunk_rows or rows_in_budget(len(v), y.device)
    losses = (_same_position if d.targets is None else _any_position)(y, w, b, d, teacher, total, rows)
    dv, dscale = (None, None) if total.dw is None else w.gradients_(total.dw, wanted[1:3])
    return losses, total.log_sum, (total.dy, dv, dscale, total.db)


def _any_position(
    y: Tensor, w: WeightNormed, b: Tensor | None, d: Distillation, teacher: WeightNormed, total: _Accumulator, rows: int
) -> Tensor:
    """Six products per row: three of every student row, three of every teacher row."""
    assert d.targets is not None
    none = d.targets < 0
    index = d.targets.clamp(min=0)
    weights = (torch.ones_like(index, dtype=y.dtype) if d.weights is None else d.weights.to(y.dtype)).masked_fill(
        none, 0
    )
    tau, nt = d.student_temperature, len(d.teacher_features)
    row_weight = weights.sum(dim=1)  # (Ns,)
    student_chunks, teacher_chunks = _chunks(len(y), rows), _chunks(nt, rows // 2)
    buffer = _buffer(max(_most_rows(student_chunks), 2 * _most_rows(teacher_chunks)), w.v)

    losses = torch.empty_like(row_weight)
    for chunk in student_chunks:
        p, log_sum = d.epilogues.predictions_(w.products(y[chunk] / tau, buffer), w.late_factor, b)
        losses[chunk] = row_weight[chunk] * log_sum.squeeze(1)
        _add_gradients(total, chunk, p, y[chunk], w, row_weight[chunk], tau)

    # What teacher row j sums over the student rows that it is a target of: their weights and their weighted features.
    target_weight = weights.new_zeros(nt).index_add_(0, index.flatten(), weights.flatten())
    target_features = y.new_zeros(nt, y.shape[1])
    for m in range(index.shape[1]):
        target_features.index_add_(0, index[:, m], weights[:, m : m + 1] * y)

    mean_prototype = torch.empty_like(target_features)  # T W
    mean_bias = y.new_zeros(nt)  # T b
    for chunk in teacher_chunks:
        targets = _targets(d, teacher, chunk, total, *buffer.chunk(2))
        if b is not None:
            mean_bias[chunk] = targets @ b
        if total.dw is not None:
            _add_average(total.dw, targets.t(), target_features[chunk] / -tau, d.product_dtype)
        if total.db is not None:
            total.db.sub_(target_weight[chunk] @ targets)
        mean_prototype[chunk] = w.average_(targets)

    for m in range(index.shape[1]):
        of_row = weights[:, m : m + 1] * mean_prototype[index[:, m]]  # (Ns, p)
        losses -= (of_row * y).sum(dim=1) / tau + weights[:, m] * mean_bias[index[:, m]]
        if total.dy is not None:
            total.dy.sub_(of_row, alpha=1 / tau)
    return losses


def _same_position(
    y: Tensor, w: WeightNormed, b: Tensor | None, d: Distillation, teacher: WeightNormed, total: _Accumulator, rows: int
) -> Tensor:
    """Four products per row: two for the logits, and P - T once with the prototypes and once with the features."""
    tau = d.student_temperature
    row_weight = y.new_ones(len(y)) if d.weights is None else d.weights[:, 0].to(y.dtype)
    chunks = _chunks(len(y), rows // 3)
    first, second, third = _buffer(3 * _most_rows(chunks), w.v).chunk(3)
    losses = torch.empty_like(row_weight)
    for chunk in chunks:
        targets = _targets(d, teacher, chunk, total, first, second)
        products = w.products(y[chunk] / tau, first)
        difference, cross_entropy = d.epilogues.differences_(products, w.late_factor, b, targets, third[: len(targets)])
        losses[chunk] = row_weight[chunk] * cross_entropy
        _add_gradients(total, chunk, difference, y[chunk], w, row_weight[chunk], tau)
    return losses


def _add_gradients(
    total: _Accumulator, chunk: slice, p: Tensor, y: Tensor, w: WeightNormed, weight: Tensor, tau: float
) -> None:
    """Add what logit gradients weight_i p_ik of one chunk contribute; p (c, K) is overwritten.

    The weights go to the narrow operands.
    """
    scale = weight[:, None] / tau
    if total.dw is not None:
        _add_average(total.dw, p.t(), scale * y, w.dtype)
    if total.db is not None:
        total.db.add_(weight @ p)
    if total.dy is not None:
        total.dy[chunk] += scale * w.average_(p)


def _targets(
    d: Distillation, teacher: WeightNormed, chunk: slice, total: _Accumulator, scratch: Tensor, result: Tensor
) -> Tensor:
    """The teacher's probabilities (c, K), Eq. 7, in `result`; on the way, the chunk's share of the statistics."""
    y = d.teacher_features[chunk]
    products, result = teacher.products(y / d.teacher_temperature, scratch), result[: len(y)]
    logits, log_sum = d.epilogues.statistics_(products, teacher.late_factor, d.statistics_bias, result)
    total.log_sum = torch.logaddexp(total.log_sum, log_sum)
    return d.epilogues.targets_(logits, d.target_bias, result)


def _add_average(total: Tensor, p: Tensor, x: Tensor, dtype: torch.dtype | None) -> None:
    """total += p @ x for p in [-1, 1]."""
    if dtype is None:
        total.addmm_(p, x)
        return
    # Weighted features may be smaller than what float16 can hold.
    largest = torch.linalg.vector_norm(x, torch.inf).clamp(min=torch.finfo(x.dtype).tiny)
    total.add_(average(p, x / largest, dtype).mul_(largest))


def rows_in_budget(columns: int, device: torch.device, buffers: int = 1) -> int:
    """How many rows of float32 logits a chunk may have (at least 1), if so many buffers hold such rows."""
    return max(1, _CHUNK_BYTES.get(device.type, 2**25) // (4 * columns * buffers))


def _buffer(rows: int, v: Tensor) -> Tensor:
    """Memory for the logits of every chunk in turn: on the CPU fresh pages cost as much as a softmax."""
    return torch.empty(rows, len(v), dtype=v.dtype, device=v.device)


def _chunks(n: int, rows: int) -> list[slice]:
    """As few slices of `n` rows as there must be with at most `rows` each (or 1), all but the last equally long."""
    size = math.ceil(n / math.ceil(n / max(rows, 1))) if n else 1
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def _most_rows(chunks: list[slice]) -> int:
    return chunks[0].stop if chunks else 0
