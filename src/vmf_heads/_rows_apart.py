"""The loss of any pairs of rows: student and teacher rows in chunks of their own, which never meet.

A target t and the logits s of a row meet only in

    H(t, s) = logsumexp(s) - sum_k t_k s_k,    sum_k t_k s_k = <sum_k t_k w_k, y> / tau + sum_k t_k b_k

and a chunk of rows gives what the loss and every gradient need of it in three products (' is the transpose):

    student rows: logits s = Y W'/tau + b, P = softmax(s), P W and P' Y
    teacher rows: targets T, T W (p numbers a row instead of K) and T' Z, Z the weighted sum of the rows they target

Crops that share a target share its products; the statistics for centring come from the same teacher logits.
All of this is sums over k. Where the prototypes are cut over ranks, each rank sums over its own, for the rows of all of
them. Its softmax is one over a part, which a `share` per row corrects: exp(logsumexp of the part - that of all). An
exchange (_shards.py) adds up what belongs to rows; what belongs to prototypes stays where it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._distillation import Distillation, GradientSums
from ._logits import LogitsMemory, chunks_of, most_rows, predictions_
from ._shards import Exchange
from ._targets import Targets, over
from ._weight_normed import WeightNormed, take_peaks_


def rows_apart(y: Tensor, w: WeightNormed, d: Distillation, targets: Targets, total: GradientSums) -> Tensor:
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
        weight = all_row_weight[chunk] * rest
        if total.db is not None:
            total.db.add_(weight @ p, alpha=1 / d.students.ranks)
        total.add_rows(chunk, p, all_y[chunk], w, weight / tau, ranks=d.students.ranks, peaks=True)
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


def _share(exchange: Exchange, part: Tensor, whole: Tensor) -> Tensor | None:
    """How much of a row's probability (c,) is with this rank's prototypes, from two logsumexps; None for all of it."""
    return None if exchange.ranks == 1 else (part - whole).exp()
