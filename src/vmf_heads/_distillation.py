"""What the fused loss is made from, and the sums over rows that its gradients are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._shards import Exchange
from ._weight_normed import Peaks, WeightNormed, add_average, take_peaks_
from .prototypes import HeadOutput

Wanted = tuple[bool, bool, bool]  # of the gradients of features, directions and scales

NO_SECOND_DERIVATIVE = (
    "a gradient of `prototype_cross_entropy`, or of a loss with fused=True, was taken with create_graph=True, but "
    "it cannot be differentiated again: it was finished in the forward pass. For a gradient penalty or a Hessian "
    "use fused=False, or `prototype_cross_entropy_reference`"
)


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


class GradientSums:
    """The gradients that chunks add to, where `wanted`."""

    def __init__(self, v: Tensor, wanted: Wanted, *, wants_db: bool) -> None:
        self.wants_dy = wanted[0]
        self.dy: Tensor | None = None
        self.dw = torch.empty_like(v) if wanted[1] or wanted[2] else None
        self._dw_is_empty = True
        self.db = v.new_zeros(len(v)) if wants_db else None

    @property
    def are_wanted(self) -> bool:
        return self.wants_dy or self.dw is not None or self.db is not None

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

    def add_rows(
        self,
        rows: slice | Tensor,
        p: Tensor,
        y: Tensor,
        w: WeightNormed,
        scale: Tensor,
        *,
        ranks: int = 1,
        peaks: bool = False,
    ) -> None:
        """Add what logit gradients scale_i p_ik of these rows give v and y; p (c, K) is overwritten.

        For products in half precision p must be in [-1, 1].
        `peaks`: p are probabilities whose targets are still to be subtracted: their peaks are kept from rounding.
        """
        taken = take_peaks_(p) if peaks and w.dtype is not None else None
        if self.dw is not None:
            self.add_dw(p, (scale / ranks)[:, None] * y, w.dtype, taken)
        if self.dy is not None:
            self.dy[rows] += scale[:, None] * w.average_(p, taken)
