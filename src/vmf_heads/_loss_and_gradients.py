"""The loss of `prototype_cross_entropy` and its gradients, from one walk over the rows.

Student logits are linear in the prototypes, so everything is a sum over rows of what a few products with the prototypes
give, and a chunk of rows is forgotten once its share has been added up. W may be given as directions and scales; then
no product needs W itself (`WeightNormed`). What is one number per row, as the sum that a softmax divides by, multiplies
the narrow operand of a product instead of the (c, K) probabilities where it can.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ._compiled import has_values
from ._distillation import Distillation, GradientSums, Wanted
from ._row_groups import row_groups
from ._rows_apart import rows_apart
from ._rows_together import groups_together, pairs_together
from ._targets import Targets
from ._weight_normed import WeightNormed


class LossAndGradients(NamedTuple):
    """The loss and the statistics (K,) of Eq. 9; the gradients of features, directions and scales, where wanted."""

    loss: Tensor
    log_sum: Tensor
    dy: Tensor | None
    dv: Tensor | None
    dscales: Tensor | None


def loss_and_gradients(
    y: Tensor, v: Tensor, scales: Tensor | None, d: Distillation, wanted: Wanted
) -> LossAndGradients:
    """Of student features (Ns, p), directions (K, p) and scales (K,)."""
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
    return LossAndGradients(loss, targets.log_sum, total.dy, dv, dscales)


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
