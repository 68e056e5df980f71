"""The losses of DINOv2 and stable-pretraining: their targets come from one call, their centre moves at the next."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .._checks import positive
from .._matmul import at_least_float32
from ._attached import SingleCenterLoss
from ._sinkhorn import sinkhorn_knopp


class LateCenterLoss(SingleCenterLoss):
    """The teacher's side of these losses: targets by centring or Sinkhorn-Knopp, and the late centre.

    A batch enters the centre when the targets of the next one are asked for.
    """

    updated = True  # DINOv2's name: whether no update of the centre is pending
    _teacher_temp: float | None = None

    @torch.no_grad()
    def softmax_center_teacher(
        self, teacher_output: Tensor, teacher_temp: float, update_centers: bool = True
    ) -> Tensor:
        """The teacher's probabilities (..., K), Eq. 7, of its head's output (..., K), after the pending centre update.

        The temperature is remembered for `update_center`, which the originals do not tell it. `update_centers`, an
        argument of stable-pretraining's, leaves a pending update for later if it is False.
        """
        self._attached()  # raises before anything changes
        self._check_columns("teacher_output", teacher_output)
        self.teacher.check_outputs(teacher_output)
        self._teacher_temp = positive("teacher_temp", teacher_temp)
        if update_centers:
            self.apply_center_update()
        return self._targets("teacher_output", teacher_output, teacher_temp)

    @torch.no_grad()
    def update_center(self, teacher_output: Tensor) -> None:
        """Take the head's output (..., K) of this batch into the next centre, Eq. 9 or Eq. 8; averages over all rows.

        Raises RuntimeError before the first `softmax_center_teacher`.
        """
        self.reduce_center_update(teacher_output)

    @torch.no_grad()
    def reduce_center_update(self, teacher_output: Tensor) -> None:
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
    def _sinkhorn_knopp(self, teacher_output: Tensor, teacher_temp: float, n_iterations: int) -> Tensor:
        """The teacher's assignments (..., K) of its scores (..., K)."""
        self._check_columns("teacher_output", teacher_output)
        self.teacher.check_outputs(teacher_output)
        logits = at_least_float32(teacher_output) / positive("teacher_temp", teacher_temp)
        assigned = sinkhorn_knopp(logits.flatten(0, -2), n_iterations, self.centering.process_group)
        return assigned.view_as(logits)

    def _log_student(self, name: str, logits: Tensor) -> Tensor:
        """log P_s (..., K) of the student's logits (..., K), Eq. 6."""
        self._attached()
        self._check_columns(name, logits)
        return torch.log_softmax(at_least_float32(logits) / self.student_temp, dim=-1)
