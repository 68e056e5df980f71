"""lightly's DINO loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..._checks import at_least, one_of, positive
from ..._matmul import at_least_float32, without_autocast
from ...cross_entropy import dino_pairs
from ...prototypes import HeadOutput
from ...teacher import features_of
from .._attached import SingleCenterLoss, check_not_empty, joined

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Views = Sequence[Tensor | HeadOutput]


class DINOLoss(SingleCenterLoss):
    """lightly's DINO loss for vMF heads: cross-entropy between Eq. 7 of the teacher and Eq. 6 of the student.

    Equals, for teacher probabilities P_t[t] and student probabilities P_s[s] of the views, (B, K) each::

        pairs = [(t, s) for t in range(teacher_views) for s in range(student_views) if t != s]
        sum((-P_t[t] * log(P_s[s])).sum(dim=1).mean() for t, s in pairs) / len(pairs)

    followed by one update of the centre with the teacher's scores of this batch. With heads of prototype norm 1 and
    centering="logit" it is lightly's own loss.

    Args:
        output_dim: number of prototypes K.
        warmup_teacher_temp: the teacher's temperature at the start, if the calls give an `epoch`.
        teacher_temp: the teacher's temperature after its warm-up, and that of calls without an `epoch`.
        warmup_teacher_temp_epochs: how many epochs the teacher's temperature rises linearly from one to the other.
        student_temp: the student's temperature.
        center_momentum: momentum of the centre.
        center_mode: "mean", the only one there is in lightly.
        centering: "probability" is Eq. 9; "logit" is DINO's Eq. 8 on logits with log C_p.
        center_on: see `ProbabilityCentering`; for centering="probability" only.
        center_start: "zeros", or "first_batch": the first update sets the centre.
        process_group: the ranks that share one centre; None means all of them.
        fused: compute loss and gradients from features with `prototype_cross_entropy`, without any logits. Same numbers
            to rounding, a fraction of the memory; attached heads then return features.

    `attach(student, teacher)` must be called once. State dict: `log_center` (K,) with probability centring; `center`
    (1, 1, K), as in lightly, with logit centring. A lightly checkpoint's `center` loads into either.

    Raises:
        ValueError, TypeError: an argument is out of its range or an output has the wrong shape.
        RuntimeError: called before `attach`.

    Reference: Govindarajan et al., ICLR 2023, Eq. 6, 7, 8 and 9; Caron et al., ICCV 2021.

    >>> import torch
    >>> from vmf_heads.compat.lightly import DINOLoss, DINOProjectionHead
    >>> student, teacher = (DINOProjectionHead(16, 16, 8, 32) for _ in range(2))
    >>> criterion = DINOLoss(output_dim=32, warmup_teacher_temp_epochs=5)
    >>> criterion.attach(student, teacher)
    >>> views = torch.randn(4, 5, 16)  # 4 views of 5 images; the teacher sees the first two
    >>> criterion([teacher(view) for view in views[:2]], [student(view) for view in views], epoch=0).shape
    torch.Size([])
    """

    def __init__(
        self,
        output_dim: int = 65536,
        warmup_teacher_temp: float = 0.04,
        teacher_temp: float = 0.04,
        warmup_teacher_temp_epochs: int = 30,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        center_mode: str = "mean",
        *,
        centering: str = "probability",
        center_on: str = "responsibilities",
        center_start: str = "zeros",
        process_group: ProcessGroup | None = None,
        fused: bool = False,
    ) -> None:
        at_least("output_dim", output_dim, 1)
        one_of("center_mode", center_mode, ("mean",))
        positive("warmup_teacher_temp", warmup_teacher_temp)
        super().__init__(
            output_dim,
            student_temp,
            center_momentum,
            (1, 1, output_dim),
            centering,
            center_on,
            center_start,
            process_group,
            fused=fused,
        )
        self.teacher_temp = positive("teacher_temp", teacher_temp)
        self.warmup_teacher_temp_epochs = at_least("warmup_teacher_temp_epochs", warmup_teacher_temp_epochs, 0)
        self.teacher_temp_schedule = torch.linspace(
            warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs, device="cpu"
        )

    def forward(
        self,
        teacher_out: Views,
        student_out: Views,
        teacher_temp: float | None = None,
        epoch: int | None = None,
        *,
        update_center: bool = True,
    ) -> Tensor:
        """The loss of what the attached heads returned, one (B, K) tensor per view; then the centre is updated.

        With fused=True the views are features (B, p). The teacher's temperature is `teacher_temp`, or that of `epoch`,
        or the constructor's. With gradients accumulated over micro-batches, update_center=False in each, and
        `update_center()` once per step, makes one update from all of them; so does update_center=False in all but the
        last.
        """
        if len(teacher_out) * len(student_out) <= min(len(teacher_out), len(student_out)):
            raise ValueError(
                f"`teacher_out` (of {len(teacher_out)} views) and `student_out` (of {len(student_out)} views) must "
                "hold two different views: a view is not compared with itself"
            )
        temperature = self._temperature(teacher_temp, epoch)
        teacher = torch.stack([features_of(view) for view in teacher_out])  # (t, B, K), or (t, B, p) of features
        student = torch.stack([features_of(view) for view in student_out])
        check_not_empty("teacher_out", teacher)
        self._check_columns("teacher_out", teacher)
        if student.shape[1:] != teacher.shape[1:]:
            raise ValueError(
                f"`student_out` (views of shape {tuple(student.shape[1:])}) must have the shape of `teacher_out` "
                f"(={tuple(teacher.shape[1:])})"
            )
        self.teacher.check_outputs(teacher, student)
        if self.fused:
            loss = self._fused(teacher_out, student_out, temperature)
        else:
            loss = self._unfused(teacher, student, temperature)
        if update_center:
            self.teacher.commit_()
        return loss

    def _unfused(self, scores: Tensor, logits: Tensor, temperature: float) -> Tensor:
        """Of all views (t, B, K) and (s, B, K)."""
        targets = self._targets("teacher_out", scores, temperature)
        log_probabilities = torch.log_softmax(at_least_float32(logits) / self.student_temp, dim=-1)
        with without_autocast(logits.device):
            cross_entropy = -torch.einsum("tbk,sbk->ts", targets, log_probabilities)
        other_view = ~torch.eye(*cross_entropy.shape, dtype=torch.bool, device=cross_entropy.device)
        self._accumulate("teacher_out", scores, temperature)
        return cross_entropy.mul(other_view).sum() / (_pairs(len(scores), len(logits)) * logits.shape[1])

    def _fused(self, teacher_out: Views, student_out: Views, temperature: float) -> Tensor:
        """Of all views, (B, p) each."""
        student_layer, teacher_layer = self.teacher.layers
        t, s = len(teacher_out), len(student_out)
        images = len(features_of(teacher_out[0]))
        rows, _ = dino_pairs(images, max(t, s), ngcrops=t, device=features_of(teacher_out[0]).device)
        rows = rows[: s * images]
        return self.teacher.at(temperature).cross_entropy(
            joined(student_out, student_layer),
            joined(teacher_out, teacher_layer),
            self.student_temp,
            teacher_rows=rows,
            weights=rows.new_full(rows.shape, 1 / (_pairs(t, s) * images), dtype=torch.float64),
        )

    @torch.no_grad()
    def targets(
        self, teacher_out: Tensor | HeadOutput, teacher_temp: float | None = None, epoch: int | None = None
    ) -> Tensor:
        """The teacher's probabilities (..., K) for its head's output, Eq. 7; the centre stays as it is."""
        return self._targets("teacher_out", teacher_out, self._temperature(teacher_temp, epoch))

    @torch.no_grad()
    def update_center(
        self,
        teacher_out: Tensor | HeadOutput | None = None,
        teacher_temp: float | None = None,
        epoch: int | None = None,
    ) -> None:
        """One step of Eq. 9 or Eq. 8 from what was accumulated since the last, over all ranks.

        With `teacher_out`, an output of the teacher's head, that is accumulated first.
        """
        if teacher_out is not None:
            self._accumulate("teacher_out", teacher_out, self._temperature(teacher_temp, epoch))
        self.teacher.commit_()

    def _temperature(self, teacher_temp: float | None, epoch: int | None) -> float:
        if teacher_temp is not None:
            return positive("teacher_temp", teacher_temp)
        if epoch is None or epoch >= self.warmup_teacher_temp_epochs:
            return self.teacher_temp
        return float(self.teacher_temp_schedule[at_least("epoch", epoch, 0)])


def _pairs(teacher_views: int, student_views: int) -> int:
    """The number of pairs of two different views."""
    return teacher_views * student_views - min(teacher_views, student_views)
