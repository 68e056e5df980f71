"""The losses of DINOv2 and stable-pretraining: their targets come from one call, their centre moves at the next."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .._checks import positive
from .._matmul import at_least_float32
from ..prototypes import HeadOutput
from ..teacher import TeacherSide, features_of
from ._attached import SingleCenterLoss, joined
from ._sinkhorn import prototype_offsets_of_features, sinkhorn_knopp


@dataclass(frozen=True)
class Reading:
    """How a fused loss reads the features that stand for the teacher's targets."""

    side: TeacherSide
    offset: Tensor  # (K,), what the teacher's logits with log C_p lose before the softmax


class LateCenterLoss(SingleCenterLoss):
    """The teacher's side of these losses: targets by centring or Sinkhorn-Knopp, and the late centre.

    A batch enters the centre when the targets of the next one are asked for.
    """

    updated = True  # DINOv2's name: whether no update of the centre is pending
    _teacher_temp: float | None = None
    _reading: Reading | None = None

    @torch.no_grad()
    def softmax_center_teacher(
        self, teacher_output: Tensor | HeadOutput, teacher_temp: float, update_centers: bool = True
    ) -> Any:
        """The teacher's probabilities (..., K), Eq. 7, of its head's output (..., K), after the pending centre update.

        The temperature is remembered for `update_center`, which the originals do not tell it. `update_centers`, an
        argument of stable-pretraining's, leaves a pending update for later if it is False.

        With fused=True the output, features (..., p), comes back as it is, to be read this way by the loss.
        """
        self._attached()  # raises before anything changes
        self._check_columns("teacher_output", teacher_output)
        self.teacher.check_outputs(teacher_output)
        self._teacher_temp = positive("teacher_temp", teacher_temp)
        if update_centers:
            self.apply_center_update()
        if not self.fused:
            return self._targets("teacher_output", teacher_output, teacher_temp)
        side = self.teacher.at(teacher_temp)
        self._reading = Reading(side, side.centering.offset(teacher_temp).clone())
        return teacher_output

    @torch.no_grad()
    def update_center(self, teacher_output: Tensor | HeadOutput) -> None:
        """Take the head's output (..., K) of this batch into the next centre, Eq. 9 or Eq. 8; averages over all rows.

        Raises RuntimeError before the first `softmax_center_teacher`.
        """
        self.reduce_center_update(teacher_output)

    @torch.no_grad()
    def reduce_center_update(self, teacher_output: Tensor | HeadOutput) -> None:
        """What `update_center` does; the ranks' sums are added in `apply_center_update`."""
        if self._teacher_temp is None:
            raise RuntimeError("call `softmax_center_teacher` before `update_center`: it tells the teacher temperature")
        self._accumulate("teacher_output", teacher_output, self._teacher_temp)
        self.updated = False

    @torch.no_grad()
    def apply_center_update(self) -> None:
        """Finish a pending update of the centre, over all ranks; without one nothing happens."""
        if not self.updated:
            self.centering.commit_()
            self.updated = True

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The state, after a pending update of the centre; of several ranks each must finish it itself, and is warned.

        In one process this is the same as finishing it in the next step, and nothing is lost between two runs.
        """
        if not self.updated:
            # A collective has no place here: often one rank alone asks for the state.
            if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
                warnings.warn(
                    "the state dict is that before the pending update of the centre, which a restart loses: call "
                    "`apply_center_update()` on every rank before you save",
                    UserWarning,
                    stacklevel=2,
                )
            else:
                self.apply_center_update()
        return super().state_dict(*args, **kwargs)

    @torch.no_grad()
    def _sinkhorn_knopp(self, teacher_output: Tensor | HeadOutput, teacher_temp: float, n_iterations: int) -> Any:
        """The teacher's assignments (..., K) of its scores (..., K); with fused=True its features as they are."""
        self._attached()  # raises before anything changes
        self._check_columns("teacher_output", teacher_output)
        self.teacher.check_outputs(teacher_output)
        positive("teacher_temp", teacher_temp)
        group = self.centering.process_group
        if not self.fused:
            scores = features_of(teacher_output)
            assigned = sinkhorn_knopp(scores.flatten(0, -2), n_iterations, group, temperature=teacher_temp)
            return assigned.view_as(scores)
        side = self.teacher.at(teacher_temp)
        offset = prototype_offsets_of_features(
            joined([teacher_output], side.layer),
            n_iterations,
            group,
            temperature=teacher_temp,
            exact=side.head.float32_scores,
        )
        # The assignments lack log C_p, which the fused cross-entropy adds.
        self._reading = Reading(side, offset + side.log_normalizer)
        return teacher_output

    def _cross_entropy_fused(
        self,
        student: Sequence[Tensor | HeadOutput],
        teacher: Sequence[Tensor | HeadOutput],
        weights: Tensor,
        teacher_rows: Tensor | None = None,
    ) -> Tensor:
        """The cross-entropy of all these rows (N, p), one after another, as `prototype_cross_entropy` counts pairs."""
        student_layer, teacher_layer = self.teacher.layers
        if self._reading is None:
            raise RuntimeError(
                "call `softmax_center_teacher` or `sinkhorn_knopp_teacher` before the loss: they tell how it reads the "
                "teacher's features"
            )
        loss, _, _ = self._reading.side.cross_entropy_and_statistics(
            joined(student, student_layer),
            joined(teacher, teacher_layer),
            self.student_temp,
            teacher_rows=teacher_rows,
            weights=weights,
            log_center=self._reading.offset,
        )
        return loss

    def _log_student(self, name: str, logits: Tensor) -> Tensor:
        """log P_s (..., K) of the student's logits (..., K), Eq. 6."""
        self._attached()
        self._check_columns(name, logits)
        return torch.log_softmax(at_least_float32(logits) / self.student_temp, dim=-1)

    def __getstate__(self) -> dict[str, Any]:
        # A reading holds the teacher's head, which a copy, not being attached, must not carry along.
        return super().__getstate__() | {"_reading": None}
