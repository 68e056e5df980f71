"""The loss in chunks as one operator, which torch.compile calls on a CPU instead of tracing it.

Traced, every chunk would be code of its own, whose passes find nothing in a cache, and no pair could be read, so that
student and teacher rows would be worked on apart. That takes longer than without a compiler.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._distillation import Distillation, Wanted
from ._expansion import constant_in_graphs
from ._loss_and_gradients import LossAndGradients, loss_and_gradients
from ._shards import Alone
from .prototypes import HeadOutput

_SCHEMA = """(
    Tensor y, Tensor v, Tensor? scales, Tensor? bias, Tensor? bias_slope,
    Tensor teacher_y, Tensor teacher_v, Tensor? teacher_scales, Tensor? statistics_bias, Tensor? target_bias,
    Tensor? teacher_rows, Tensor? weights, float teacher_temperature, float student_temperature, SymInt chunk_rows,
    bool[] wanted
) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"""


def is_an_operator(v: Tensor, d: Distillation) -> bool:
    """Whether the loss of these prototypes is the operator's: on a CPU, where torch.compile traces.

    Not for torch.export, because its program shall run without this library. Not where a temperature is a tensor or,
    which is the same to the tracer, a number of NumPy's: the operator takes none.
    """
    compiling_here = torch.compiler.is_compiling() and v.device.type == "cpu" and d.students.ranks == 1
    are_numbers = isinstance(d.teacher_temperature, (int, float)) and isinstance(d.student_temperature, (int, float))
    return compiling_here and are_numbers and not _is_exporting()


@constant_in_graphs
def _is_exporting() -> bool:
    return torch.compiler.is_exporting()  # where it is traced, torch 2.8 takes it to be true


def chunked_operator(y: Tensor, v: Tensor, scales: Tensor | None, d: Distillation, wanted: Wanted) -> LossAndGradients:
    """`loss_and_gradients` by the operator."""
    student, biases = (y, v, scales, d.bias, d.bias_slope), (d.statistics_bias, d.target_bias)
    temperatures = d.teacher_temperature, d.student_temperature
    loss, log_sum, *gradients = _operator(
        *student, *d.teacher, *biases, d.teacher_rows, d.weights, *temperatures, d.chunk_rows, wanted
    )
    dy, dv, dscales = (made if is_wanted else None for made, is_wanted in zip(gradients, wanted, strict=True))
    return LossAndGradients(loss, log_sum, dy, dv, dscales)


@torch.library.custom_op("vmf_heads::chunked_cross_entropy", mutates_args=(), schema=_SCHEMA)
def _operator(
    y: Tensor,
    v: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    bias_slope: Tensor | None,
    teacher_y: Tensor,
    teacher_v: Tensor,
    teacher_scales: Tensor | None,
    statistics_bias: Tensor | None,
    target_bias: Tensor | None,
    teacher_rows: Tensor | None,
    weights: Tensor | None,
    teacher_temperature: float,
    student_temperature: float,
    chunk_rows: int,
    wanted: Sequence[bool],
) -> tuple[Tensor, ...]:
    """A gradient that is not wanted is an empty tensor: an operator has no other way to leave one out."""
    distillation = Distillation(
        bias=bias,
        bias_slope=bias_slope,
        teacher=HeadOutput(teacher_y, teacher_v, teacher_scales),
        teacher_temperature=teacher_temperature,
        student_temperature=student_temperature,
        statistics_bias=statistics_bias,
        target_bias=target_bias,
        teacher_rows=teacher_rows,
        weights=weights,
        chunk_rows=chunk_rows,
        product_dtype=None,
        students=Alone(),
        teachers=Alone(),
    )
    of_features, of_directions, of_scales = wanted
    made = loss_and_gradients(y, v, scales, distillation, (of_features, of_directions, of_scales))
    return tuple(y.new_empty(0) if result is None else result for result in made)


@_operator.register_fake
def _(y: Tensor, v: Tensor, scales: Tensor | None, *others: object) -> tuple[Tensor, ...]:
    wanted: Sequence[bool] = others[-1]  # type: ignore[assignment]
    gradients = zip((y, v, scales), wanted, strict=True)
    made = [y.new_empty(0) if x is None or not is_wanted else torch.empty_like(x) for x, is_wanted in gradients]
    return y.new_empty(()), v.new_empty(len(v)), *made
