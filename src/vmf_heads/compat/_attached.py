"""Base classes of the losses: one or more `TeacherTargets`, under the names of the original's state dict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from .._checks import at_least
from .._state_names import RenamedState
from ..centering import Centering
from ..prototypes import HeadOutput, PrototypeLayer
from ..teacher import TeacherTargets, features_of, with_prototypes

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# The options that every loss hands on to its `TeacherTargets`.
CENTER_OPTIONS = ("centering", "center_on", "center_start", "process_group")


def check_not_empty(name: str, output: Tensor | HeadOutput) -> None:
    """Raise ValueError if `output` has no rows: the loss is a mean over images, and that of none is NaN."""
    shape = tuple(features_of(output).shape)
    if not shape or 0 in shape:
        raise ValueError(f"`{name}` (of shape {shape}) must hold at least one image: the loss is a mean over images")


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
        fused: whether the heads shall return features instead of logits and scores.
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
        *,
        fused: bool = False,
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
                fused=fused,
                process_group=process_group,
            )
        )
        self.num_prototypes = out_dim
        self.center_momentum = center_momentum

    @property
    def _columns(self) -> int:
        """Of what the heads return: p of features, K of logits and scores."""
        dim: int = self._attached()[1].bottleneck_dim if self.fused else self.num_prototypes
        return dim

    def _targets(self, name: str, output: Tensor | HeadOutput, temperature: float) -> Tensor:
        """Eq. 7 (..., K) of what the teacher's head returned, which errors call `name`; the centre stays as it is."""
        return self.teacher.at(temperature).targets(self._read(name, output))

    def _accumulate(self, name: str, output: Tensor | HeadOutput, temperature: float) -> None:
        """Add what the teacher's head returned, which errors call `name`, to what the centre's next step averages."""
        self.teacher.at(temperature).accumulate_(self._read(name, output))

    def _read(self, name: str, output: Tensor | HeadOutput) -> Tensor | HeadOutput:
        """The teacher's output, which errors call `name`, with its prototypes if `fused`."""
        self._check_columns(name, output)
        return with_prototypes(output, self.teacher.layers[1]) if self.fused else features_of(output)

    def _check_columns(self, name: str, output: Tensor | HeadOutput) -> None:
        shape = features_of(output).shape
        if len(shape) < 2 or shape[-1] != self._columns:
            raise ValueError(f"`{name}` (of shape {tuple(shape)}) must be (..., {self._columns})")


def rows_of(output: Tensor | HeadOutput, index: slice | Tensor) -> Tensor | HeadOutput:
    """These rows of what a head returned, with what came along."""
    return output._replace(features=output.features[index]) if isinstance(output, HeadOutput) else output[index]


def joined(outputs: Sequence[Tensor | HeadOutput], layer: PrototypeLayer) -> HeadOutput:
    """All rows (N, p) of the outputs (..., p) of one head, with the prototypes they belong to."""
    features = torch.cat([features_of(output).flatten(0, -2) for output in outputs])
    return with_prototypes(outputs[0], layer)._replace(features=features)
