"""Base classes of the losses: one or more `TeacherTargets`, under the names of the original's state dict."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from .._checks import at_least
from .._state_names import RenamedState
from ..centering import Centering
from ..teacher import TeacherTargets

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# The options that every loss hands on to its `TeacherTargets`.
CENTER_OPTIONS = ("centering", "center_on", "center_start", "process_group")


class AttachedLoss(RenamedState):
    """A loss that works on what the heads of a student and a teacher return, and owns their temperatures.

    Args:
        teacher: the teacher's side. A loss with several terms has one for each, this is the first.
    """

    teacher: TeacherTargets
    STATE_NAMES: ClassVar[dict[str, str]] = {f"teacher.{name}": name for name in TeacherTargets.STATE_NAMES.values()}

    def __init__(self, teacher: TeacherTargets) -> None:
        super().__init__()
        self.teacher = teacher

    @property
    def student_temp(self) -> float:
        """The student's temperature."""
        return self.teacher.student_temp

    @property
    def fused(self) -> bool:
        """Whether the attached heads return features instead of logits and scores."""
        return self.teacher.fused

    @property
    def centering(self) -> Centering:
        """The centre."""
        return self.teacher.centering

    @property
    def center(self) -> Any:
        """The buffer of the original loss, with logit centring only."""
        return self.centering.center

    def attach(self, student: nn.Module, teacher: nn.Module, head: str | None = None) -> None:
        """Find the head in `student` and in `teacher` and take over their temperatures; see `TeacherTargets.attach`."""
        self.teacher.attach(student, teacher, head)

    def _attached(self) -> tuple[Any, Any]:
        """The heads of student and teacher, whose temperature is still the loss's."""
        return self.teacher.heads


class SingleCenterLoss(AttachedLoss):
    """A loss with one centre that is told the teacher's temperature with every call, as in lightly and DINOv2.

    State dict: `log_center` (K,) with probability centring (Eq. 9); `center`, of the original's shape, with logit
    centring (Eq. 8). A `center` of the original loads into either.

    Args:
        out_dim: number of prototypes K.
        student_temp: the student's temperature.
        center_momentum: momentum of the centre.
        center_shape: of the original's buffer.
        centering: "probability" or "logit".
        center_on: see `ProbabilityCentering`.
        center_start: see `ProbabilityCentering`.
        process_group: the ranks that share one centre.
    """

    def __init__(
        self,
        out_dim: int,
        student_temp: float,
        center_momentum: float,
        center_shape: tuple[int, ...],
        centering: str,
        center_on: str,
        center_start: str,
        process_group: ProcessGroup | None,
    ) -> None:
        super().__init__(
            TeacherTargets(
                at_least("out_dim", out_dim, 1),
                student_temp,
                center_momentum,
                centering=centering,
                center_on=center_on,
                center_start=center_start,
                center_shape=center_shape,
                process_group=process_group,
            )
        )
        self.num_prototypes = out_dim
        self.center_momentum = center_momentum

    def _targets(self, name: str, scores: Tensor, temperature: float) -> Tensor:
        """Eq. 7 (..., K) of the teacher's raw scores (..., K), which errors call `name`; the centre stays as it is."""
        self._check_columns(name, scores)
        return self.teacher.at(temperature).targets(scores)

    def _accumulate(self, name: str, scores: Tensor, temperature: float) -> None:
        """Add these scores (..., K), which errors call `name`, to what the next step of the centre averages."""
        self._check_columns(name, scores)
        self.teacher.at(temperature).accumulate_(scores)

    def _check_columns(self, name: str, tensor: Tensor) -> None:
        if tensor.dim() < 2 or tensor.shape[-1] != self.num_prototypes:
            raise ValueError(f"`{name}` (of shape {tuple(tensor.shape)}) must be (..., {self.num_prototypes})")
