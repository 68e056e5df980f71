"""Loss and gradients of `prototype_cross_entropy`, finished chunk by chunk in the forward pass.

Student logits are linear in the prototypes, so a target t and the logits s of a row meet only in

    H(t, s) = logsumexp(s) - sum_k t_k s_k,    sum_k t_k s_k = <sum_k t_k w_k, y> / tau + sum_k t_k b_k

and a chunk of rows gives what the loss and every gradient need of it in a few products (' is the transpose):

    student rows: logits s = Y W'/tau + b, P = softmax(s), P W and P' Y
    teacher rows: targets T, T W (p numbers a row instead of K) and T' Z, Z the weighted sum of the rows they target

Crops that share a target share its products; the statistics for centring come from the same teacher logits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ._fused import is_plain_eager
from ._matmul import mm_float32, without_autocast

# The logits of one chunk take at most so many bytes: enough rows to use the prototypes often each time they are read.
_CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 512 * 2**20}


@dataclass(frozen=True)
class Distillation:
    """Everything but the three tensors that carry gradients; names as in `prototype_cross_entropy`."""

    teacher_features: Tensor
    teacher_prototypes: Tensor
    statistics_bias: Tensor | None  # what the statistics' logits have on top of the raw scores: nothing or log C_p
    target_bias: Tensor | None  # what the targets' have on top of those: log C_p - c or -c
    student_temperature: float
    teacher_temperature: float
    targets: Tensor | None
    weights: Tensor | None
    per_row: bool
    chunk_rows: int | None
    product_dtype: torch.dtype | None


class ChunkedCrossEntropy(Function):
    """(loss, log_sum) of student features (Ns, p), prototypes (K, p) and bias (K,); `wanted` says which gradients."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, w: Tensor, b: Tensor | None, d: Distillation, wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor, Tensor]:
        ctx.distillation, ctx.wanted = d, wanted
        now = (False, False, False) if d.per_row else wanted
        losses, log_sum, gradients = _finish(y, w, b, d, now)
        # Per-row losses meet gradients of their own in the backward pass, which has to start again from the inputs.
        ctx.save_for_backward(*((y, w, b) if d.per_row else gradients))
        ctx.mark_non_differentiable(log_sum)
        return (losses if d.per_row else losses.sum()), log_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.distillation.per_row:
            unscaled = _is_known_to_be_one(grad)  # spares a second (K, p) gradient
            return *(g if g is None or unscaled else g * grad for g in ctx.saved_tensors), None, None
        y, w, b = ctx.saved_tensors
        d = ctx.distillation
        shape = (len(y), 1) if d.targets is None else d.targets.shape
        weights = grad[:, None].expand(shape) if d.weights is None else d.weights * grad[:, None]
        with without_autocast(y.device):  # as in the forward pass
            _, _, gradients = _finish(y, w, b, replace(d, weights=weights), ctx.wanted)
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

    def __init__(self, y: Tensor, w: Tensor, wanted: tuple[bool, bool, bool]) -> None:
        self.dy = torch.zeros_like(y) if wanted[0] else None
        self.dw = torch.zeros_like(w) if wanted[1] else None
        self.db = w.new_zeros(len(w)) if wanted[2] else None
        self.log_sum = w.new_full((len(w),), -torch.inf)


def _finish(
    y: Tensor, w: Tensor, b: Tensor | None, d: Distillation, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """The losses (Ns,), log_sum (K,) and the gradients of the summed losses with respect to y, w and b."""
    total = _Accumulator(y, w, wanted)
    rows = d.chunk_rows or max(1, _CHUNK_BYTES.get(y.device.type, 2**25) // (4 * len(w)))
    losses = (_same_position if d.targets is None else _any_position)(y, w, b, d, total, rows)
    return losses, total.log_sum, (total.dy, total.dw, total.db)


def _any_position(y: Tensor, w: Tensor, b: Tensor | None, d: Distillation, total: _Accumulator, rows: int) -> Tensor:
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
    buffer = _buffer(max(_most_rows(student_chunks), 2 * _most_rows(teacher_chunks)), w)

    losses = torch.empty_like(row_weight)
    for chunk in student_chunks:
        logits = _logits(y[chunk], w, b, tau, d.product_dtype, buffer)
        largest = logits.amax(dim=1, keepdim=True)
        p = logits.sub_(largest).exp_()  # by hand, because a softmax would need memory of its own
        p_sum = p.sum(dim=1, keepdim=True)
        losses[chunk] = row_weight[chunk] * (largest + p_sum.log()).squeeze(1)
        _add_gradients(total, chunk, p.div_(p_sum), y[chunk], w, row_weight[chunk], tau, d.product_dtype)

    # What teacher row j sums over the student rows that it is a target of: their weights and their weighted features.
    target_weight = weights.new_zeros(nt).index_add_(0, index.flatten(), weights.flatten())
    target_features = y.new_zeros(nt, y.shape[1])
    for m in range(index.shape[1]):
        target_features.index_add_(0, index[:, m], weights[:, m : m + 1] * y)

    mean_prototype = torch.empty(nt, w.shape[1], dtype=w.dtype, device=w.device)  # T W
    mean_bias = y.new_zeros(nt)  # T b
    for chunk in teacher_chunks:
        targets = _targets(d, chunk, total, *buffer.chunk(2))
        mean_prototype[chunk] = _average(targets, w, d.product_dtype)
        if b is not None:
            mean_bias[chunk] = targets @ b
        if total.dw is not None:
            _add_average(total.dw, targets.t(), target_features[chunk] / -tau, d.product_dtype)
        if total.db is not None:
            total.db.sub_(target_weight[chunk] @ targets)

    for m in range(index.shape[1]):
        of_row = weights[:, m : m + 1] * mean_prototype[index[:, m]]  # (Ns, p)
        losses -= (of_row * y).sum(dim=1) / tau + weights[:, m] * mean_bias[index[:, m]]
        if total.dy is not None:
            total.dy.sub_(of_row, alpha=1 / tau)
    return losses


def _same_position(y: Tensor, w: Tensor, b: Tensor | None, d: Distillation, total: _Accumulator, rows: int) -> Tensor:
    """Four products per row: two for the logits, and P - T once with the prototypes and once with the features."""
    tau = d.student_temperature
    row_weight = y.new_ones(len(y)) if d.weights is None else d.weights[:, 0].to(y.dtype)
    chunks = _chunks(len(y), rows // 3)
    first, second, third = _buffer(3 * _most_rows(chunks), w).chunk(3)
    losses = torch.empty_like(row_weight)
    for chunk in chunks:
        targets = _targets(d, chunk, total, first, second)
        logits = _logits(y[chunk], w, b, tau, d.product_dtype, first)
        log_p = torch.log_softmax(logits, dim=1, out=third[: len(logits)])
        losses[chunk] = -row_weight[chunk] * torch.mul(targets, log_p, out=logits).sum(dim=1)
        difference = log_p.exp_().sub_(targets)
        _add_gradients(total, chunk, difference, y[chunk], w, row_weight[chunk], tau, d.product_dtype)
    return losses


def _add_gradients(
    total: _Accumulator,
    chunk: slice,
    p: Tensor,
    y: Tensor,
    w: Tensor,
    weight: Tensor,
    tau: float,
    dtype: torch.dtype | None,
) -> None:
    """Add what logit gradients weight_i p_ik of one chunk contribute, p (c, K); the weights go to narrow operands."""
    scale = weight[:, None] / tau
    if total.dy is not None:
        total.dy[chunk] += scale * _average(p, w, dtype)
    if total.dw is not None:
        _add_average(total.dw, p.t(), scale * y, dtype)
    if total.db is not None:
        total.db.add_(weight @ p)


def _targets(d: Distillation, chunk: slice, total: _Accumulator, scratch: Tensor, result: Tensor) -> Tensor:
    """The teacher's probabilities (c, K), Eq. 7, in `result`; on the way, the chunk's share of the statistics."""
    y, w = d.teacher_features[chunk], d.teacher_prototypes
    logits = _logits(y, w, d.statistics_bias, d.teacher_temperature, d.product_dtype, scratch)
    log_p = torch.log_softmax(logits, dim=1, out=result[: len(y)])
    largest = log_p.amax(dim=0)  # a sum of probabilities would underflow where no row of the chunk chooses k
    total.log_sum = torch.logaddexp(total.log_sum, log_p.sub_(largest).exp_().sum(dim=0).log_().add_(largest))
    if d.target_bias is not None:
        logits.add_(d.target_bias)
    return torch.softmax(logits, dim=1, out=result[: len(y)])


def _logits(y: Tensor, w: Tensor, b: Tensor | None, tau: float, dtype: torch.dtype | None, buffer: Tensor) -> Tensor:
    """y w'/tau + b, in `buffer` unless the operands are in half precision."""
    if dtype is None:
        logits = torch.mm(y / tau, w.t(), out=buffer[: len(y)])
    else:
        logits = mm_float32((y / tau).to(dtype), w.t().to(dtype))
    return logits if b is None else logits.add_(b)


def _average(p: Tensor, x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """p @ x for p in [-1, 1]."""
    if dtype is None:
        return p @ x
    if dtype is not torch.float16:
        return mm_float32(p.to(dtype), x.to(dtype))
    # float16 ends at 6e-8: small probabilities and weighted features move into its range before they are rounded.
    largest = torch.linalg.vector_norm(x, torch.inf).clamp(min=torch.finfo(x.dtype).tiny)
    return mm_float32((p * 2**14).to(dtype), (x / largest).to(dtype)).mul_(largest / 2**14)


def _add_average(total: Tensor, p: Tensor, x: Tensor, dtype: torch.dtype | None) -> None:
    if dtype is None:
        total.addmm_(p, x)
    else:
        total.add_(_average(p, x, dtype))


def _buffer(rows: int, w: Tensor) -> Tensor:
    """Memory for the logits of every chunk in turn: on the CPU fresh pages cost as much as a softmax."""
    return torch.empty(rows, len(w), dtype=w.dtype, device=w.device)


def _chunks(n: int, rows: int) -> list[slice]:
    """As few slices of `n` rows as there must be with at most `rows` each (or 1), all but the last equally long."""
    size = math.ceil(n / math.ceil(n / max(rows, 1))) if n else 1
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def _most_rows(chunks: list[slice]) -> int:
    return chunks[0].stop if chunks else 0
