"""The loss of student rows in one chunk with the teacher rows that they are trained towards.

Softmax and targets meet there, so that their difference is multiplied with prototypes and features once. That takes two
products fewer for every teacher row than chunks of their own (_rows_apart.py), and what is rounded is the difference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._distillation import Distillation, GradientSums
from ._logits import (
    LogitsMemory,
    chunks_of,
    logits_,
    meet_at_same_place_,
    meet_in_groups_,
    most_rows,
    subtract_at_same_place_,
    subtract_in_groups_,
)
from ._row_groups import TeacherChunk
from ._targets import Targets, over
from ._weight_normed import WeightNormed

_MOST_PAIRS = 384
"""The products get no faster with more, and the fewer they are, the more prototypes of them are in a cache at a time.

With some thousand prototypes, memory for so many takes less than 32 MiB. That much the C library keeps between calls.
"""


def pairs_together(y: Tensor, w: WeightNormed, d: Distillation, targets: Targets, total: GradientSums) -> Tensor:
    """The weighted losses (Ns,) of rows that are trained towards the teacher row at their own place, as patches are.

    Four products of every pair: two for the logits, and P - T with prototypes and features.
    """
    tau, exchange = d.student_temperature, d.students
    row_weight = y.new_ones(len(y)) if d.weights is None else d.weights[:, 0].to(y.dtype)
    y, z, row_weight = exchange.gather(y), exchange.gather(d.teacher.features), exchange.gather(row_weight)
    chunks = chunks_of(len(y), pairs_per_chunk(d.chunk_rows, y.device))
    memory = LogitsMemory(2 * most_rows(chunks), w.v)
    total.begin_rows(y)
    losses = torch.empty_like(row_weight)
    for chunk in chunks:
        features, weight = y[chunk], row_weight[chunk]
        first, second = memory.take(len(features), len(features))
        p, divisor, share = targets.make(z[chunk], first, second)
        target_factor = over(share, divisor)
        logits, largest = logits_(w, features / tau, d.bias, second)
        divisor, mean_logit = meet_at_same_place_(logits, largest, p)
        log_sum, inverse = divisor.log(), divisor.reciprocal()
        if exchange.ranks > 1:
            whole = exchange.logsumexp(largest + log_sum) - largest
            inverse, log_sum = (-whole).exp(), whole if share is None else whole * share
        losses[chunk] = weight * (log_sum - target_factor * mean_logit)
        if total.are_wanted:
            subtract_at_same_place_(logits, inverse, p, target_factor, total.db, weight / exchange.ranks)
            total.add_rows(chunk, logits, features, w, weight / tau, ranks=exchange.ranks)
    if total.dy is not None:
        total.dy = exchange.sum_own(total.dy)
    return exchange.sum_own(losses)


def pairs_per_chunk(chunk_rows: int, device: torch.device) -> int:
    """How many pairs are in memory at a time, of `chunk_rows` rows of logits."""
    if device.type == "cpu":
        return min(chunk_rows // 2, _MOST_PAIRS)
    return chunk_rows // 3  # logits, targets and, because there are no blocks, the product of the two


def groups_together(
    y: Tensor, w: WeightNormed, d: Distillation, chunks: tuple[TeacherChunk, ...], targets: Targets, total: GradientSums
) -> Tensor:
    """The weighted losses (Ns,). Three products of every student row, and one of every teacher row.

    Besides there are two small ones of the rows that meet: T with the student's logits, and the weights with T.
    """
    assert d.teacher_rows is not None
    tau = d.student_temperature
    weights = torch.ones_like(d.teacher_rows, dtype=y.dtype) if d.weights is None else d.weights.to(y.dtype)
    memory = LogitsMemory(max((chunk.rows_of_memory for chunk in chunks), default=0), w.v)
    total.begin_rows(y)
    losses = y.new_zeros(len(y))  # also of rows without a teacher
    for teachers in chunks:
        nt = len(teachers.rows)
        p, divisor, share = targets.make(d.teacher.features[teachers.rows], *memory.take(nt, nt))
        factor = over(share, divisor)
        for students in teachers.students:
            features = y[students.rows]
            _, buffer = memory.take(nt, len(students.rows))  # the targets stay where they are: in the first nt rows
            logits, largest = logits_(w, features / tau, d.bias, buffer)
            pair_weight = students.weights_of_pairs(weights, nt)
            row_weight = pair_weight.sum(dim=1)
            pair_weight *= factor
            divisor, mean_logit = meet_in_groups_(logits, largest, p, pair_weight, students.groups)
            losses[students.rows] = row_weight * divisor.log() - mean_logit
            if total.are_wanted:
                subtract_in_groups_(logits, row_weight / divisor, p, pair_weight, students.groups, total.db)
                total.add_rows(students.rows, logits, features, w, torch.full_like(row_weight, 1 / tau))
    return losses
