"""Loss and gradients of `prototype_cross_entropy`, finished chunk by chunk in the forward pass.

Student logits are linear in the prototypes, so a target t and the logits s of a row meet only in

    H(t, s) = logsumexp(s) - sum_k t_k s_k,    sum_k t_k s_k = <sum_k t_k w_k, y> / tau + sum_k t_k b_k

and a chunk of rows gives what the loss and every gradient need of it in a few products (' is the transpose):

    student rows: logits s = Y W'/tau + b, P = softmax(s), P W and P' Y
    teacher rows: targets T, T W (p numbers a row instead of K) and T' Z, Z the weighted sum of the rows they target

Crops that share a target share its products; the statistics for centring come from the same teacher logits.
All of this is sums over k. Where the prototypes are cut over ranks, each rank sums over its own, for the rows of all of
them. Its softmax is one over a part, which a `share` per row corrects: exp(logsumexp of the part - that of all). An
exchange (_shards.py) adds up what belongs to rows; what belongs to prototypes stays where it is.
W may be given as directions and scales; then no product needs W itself (`WeightNormed`). What is one number per row, as
the sum that a softmax divides by, multiplies the narrow operand of a product instead of the (c, K) probabilities.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ._compiled import is_plain_eager
from ._logits import LogitsMemory, chunks_of, differences_, most_rows, predictions_
from ._once import once_differentiable
from ._shards import Exchange
from ._targets import Targets, over
from ._weight_normed import Peaks, WeightNormed, add_average, take_peaks_
from .prototypes import HeadOutput

Wanted = tuple[bool, bool, bool]  # of the gradients of features, directions and scales


@dataclass(frozen=True)
class Distillation:
    """Everything in `prototype_cross_entropy` that carries no gradient.

    The student's bias b = log C_p does depend on the prototypes. Its derivative is `bias_slope` (K,): db/dw = slope w,
    and of a scale g alike db/dg = slope g. None: no gradient of it is wanted.
    """

    bias: Tensor | None
    bias_slope: Tensor | None
    teacher: HeadOutput
    teacher_temperature: float
    student_temperature: float
    statistics_bias: Tensor | None  # what the statistics' logits have on top of the raw scores: nothing or log C_p
    target_bias: Tensor | None  # what the targets' logits have on top of those: log C_p - c or -c
    teacher_rows: Tensor | None
    weights: Tensor | None
    chunk_rows: int
    product_dtype: torch.dtype | None
    students: Exchange  # of student rows with the ranks that hold the other prototypes
    teachers: Exchange


class ChunkedCrossEntropy(Function):
    """(loss, log_sum) of student features (Ns, p), directions (K, p) and scales (K,).

    `wanted` says which of their gradients to make, in the forward pass. Where the prototypes are cut over ranks, v, the
    scales, the bias and log_sum are of this rank's, and their gradients those of the mean of the losses of these ranks.
    """

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, v: Tensor, scales: Tensor | None, d: Distillation, wanted: Wanted
    ) -> tuple[Tensor, Tensor]:
        total = _Accumulator(v, wanted, wants_db=d.bias_slope is not None)
        w = WeightNormed(v, scales, d.product_dtype)
        targets = Targets(
            WeightNormed(d.teacher.directions, d.teacher.scales, d.product_dtype),
            d.teacher_temperature,
            d.statistics_bias,
            d.target_bias,
            d.teachers,
            d.chunk_rows,
        )
        loss = (_same_position if d.teacher_rows is None else _any_position)(y, w, d, targets, total).sum()
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


def _is_batched(grad: Tensor) -> bool:
    """Whether `grad` stands for several, as under torch.autograd.grad(is_grads_batched=True)."""
    try:
        grad.untyped_storage()
    except NotImplementedError:  # which torch raises for batched tensors alone: they have no storage of their own
        return True
    return False


class _Accumulator:
    """The gradients that chunks add to, where `wanted`."""

    def __init__(self, v: Tensor, wanted: Wanted, *, wants_db: bool) -> None:
        self.wants_dy = wanted[0]
        self.dy: Tensor | None = None
        self.dw = torch.empty_like(v) if wanted[1] or wanted[2] else None
        self._dw_is_empty = True
        self.db = v.new_zeros(len(v)) if wants_db else None

    def add_dw(self, p: Tensor, x: Tensor, dtype: torch.dtype | None, peaks: Peaks | None) -> None:
        """Add p' x (K, p) for p (c, K); the first one is written to fresh memory, which saves filling it with zeros."""
        if self.dw is not None:
            add_average(self.dw, p, x, dtype, peaks, is_empty=self._dw_is_empty)
            self._dw_is_empty = False

    def finished_dw(self) -> Tensor | None:
        """The gradient of the prototypes; zeros after no row at all."""
        return self.dw.zero_() if self.dw is not None and self._dw_is_empty else self.dw

    def begin_rows(self, y: Tensor) -> None:
        """Of the rows y that come now, of all ranks, the gradients are to be summed."""
        self.dy = torch.zeros_like(y) if self.wants_dy else None


def _any_position(y: Tensor, w: WeightNormed, d: Distillation, targets: Targets, total: _Accumulator) -> Tensor:
    """The weighted losses (Ns,). Six products per row: three of every student row, three of every teacher row."""
    assert d.teacher_rows is not None
    none = d.teacher_rows < 0
    index = d.teacher_rows.clamp(min=0)
    weights = (torch.ones_like(index, dtype=y.dtype) if d.weights is None else d.weights.to(y.dtype)).masked_fill(
        none, 0
    )
    tau, nt = d.student_temperature, len(d.teacher.features)
    row_weight = weights.sum(dim=1)  # (Ns,)
    # What teacher row j sums over the student rows that it is a target of: their weights and their weighted features.
    target_weight = weights.new_zeros(nt).index_add_(0, index.flatten(), weights.flatten())
    target_features = y.new_zeros(nt, y.shape[1])
    for m in range(index.shape[1]):
        target_features.index_add_(0, index[:, m], weights[:, m : m + 1] * y)

    all_y, all_row_weight = d.students.gather(y), d.students.gather(row_weight)
    all_z, all_target_weight = d.teachers.gather(d.teacher.features), d.teachers.gather(target_weight)
    all_target_features = d.teachers.gather(target_features)
    student_chunks = chunks_of(len(all_y), d.chunk_rows)
    memory = LogitsMemory(max(most_rows(student_chunks), targets.rows_of_memory(len(all_z))), w.v)

    total.begin_rows(all_y)
    log_sums = torch.empty_like(all_row_weight)
    for chunk in student_chunks:
        (buffer,) = memory.take(len(all_y[chunk]))
        p, divisor, part = predictions_(w, all_y[chunk] / tau, d.bias, buffer)
        log_sums[chunk] = d.students.logsumexp(part)
        rest = over(_share(d.students, part, log_sums[chunk]), divisor)
        _add_gradients(total, d.students, chunk, p, all_y[chunk], w, all_row_weight[chunk] * rest, tau, peaks=True)
    losses = row_weight * d.students.own(log_sums)
    if total.dy is not None:
        total.dy = d.students.sum_own(total.dy)

    mean_prototype = torch.empty_like(all_target_features)  # T W
    mean_bias = y.new_zeros(len(all_z))  # T b
    for chunk, p, factor in targets.chunks(all_z, memory):
        if d.bias is not None:
            mean_bias[chunk] = (p @ d.bias) * factor
        if total.db is not None:
            total.db.sub_((all_target_weight[chunk] * factor) @ p, alpha=1 / d.students.ranks)
        peaks = take_peaks_(p) if w.dtype is not None else None
        if total.dw is not None:
            features = all_target_features[chunk] * (factor / (-tau * d.students.ranks))[:, None]
            total.add_dw(p, features, w.dtype, peaks)
        mean_prototype[chunk] = w.average_(p, peaks) * factor[:, None]
    mean_prototype, mean_bias = d.teachers.sum_own(mean_prototype), d.teachers.sum_own(mean_bias)

    scaled = w.rounded(y / tau)  # as in the products that the logsumexp is made of, or the difference would keep it
    for m in range(index.shape[1]):
        of_row = weights[:, m : m + 1] * mean_prototype[index[:, m]]  # (Ns, p)
        losses -= (of_row * scaled).sum(dim=1) + weights[:, m] * mean_bias[index[:, m]]
        if total.dy is not None:
            total.dy.sub_(of_row, alpha=1 / tau)
    return losses


def _same_position(y: Tensor, w: WeightNormed, d: Distillation, targets: Targets, total: _Accumulator) -> Tensor:
    """The weighted losses (Ns,). Four products per row: two for the logits, and P - T with prototypes and features."""
    tau, exchange = d.student_temperature, d.students
    row_weight = y.new_ones(len(y)) if d.weights is None else d.weights[:, 0].to(y.dtype)
    y, z, row_weight = exchange.gather(y), exchange.gather(d.teacher.features), exchange.gather(row_weight)
    chunks = chunks_of(len(y), d.chunk_rows // 3)
    memory = LogitsMemory(3 * most_rows(chunks), w.v)
    total.begin_rows(y)
    losses = torch.empty_like(row_weight)
    for chunk in chunks:
        first, second, third = memory.take(len(y[chunk]), 3)
        p, divisor, share = targets.make(z[chunk], first, third)
        p.mul_(over(share, divisor)[:, None])
        difference, cross_entropy = differences_(w, y[chunk] / tau, d.bias, p, share, (second, third), exchange)
        losses[chunk] = row_weight[chunk] * cross_entropy
        _add_gradients(total, exchange, chunk, difference, y[chunk], w, -row_weight[chunk], tau, peaks=False)
    if total.dy is not None:
        total.dy = exchange.sum_own(total.dy)
    return exchange.sum_own(losses)


def _add_gradients(
    total: _Accumulator,
    exchange: Exchange,
    chunk: slice,
    p: Tensor,
    y: Tensor,
    w: WeightNormed,
    weight: Tensor,
    tau: float,
    *,
    peaks: bool,
) -> None:
    """Add what logit gradients weight_i p_ik of one chunk contribute; p (c, K) in [-1, 1] is overwritten.

    `peaks`: p are probabilities whose targets are still to be subtracted, so that their peaks are kept from rounding.
    """
    scale = weight[:, None] / tau
    if total.db is not None:
        total.db.add_(weight @ p, alpha=1 / exchange.ranks)
    taken = take_peaks_(p) if peaks and w.dtype is not None else None
    if total.dw is not None:
        total.add_dw(p, scale / exchange.ranks * y, w.dtype, taken)
    if total.dy is not None:
        total.dy[chunk] += scale * w.average_(p, taken)


def _share(exchange: Exchange, part: Tensor, whole: Tensor) -> Tensor | None:
    """How much of a row's probability (c,) is with this rank's prototypes, from two logsumexps; None for all of it."""
    return None if exchange.ranks == 1 else (part - whole).exp()
