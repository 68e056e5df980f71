"""One objective of a loss at one moment of training: how it reads what the teacher's head returned."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from .._matmul import at_least_float32, without_autocast
from .._prototypes import Prototypes
from ..cross_entropy import prototype_cross_entropy
from ..head import HeadOutput, VMFPrototypeHead
from ._centre import Centre, ProbabilityCentre, scores_of


@dataclass(frozen=True)
class Objective:
    """The teacher's temperature, the log C_p of its prototypes at it (K,), up to a constant, and its centre.

    What the teacher returned are raw scores (..., K), or a `HeadOutput` whose products they are. Those stay in float32
    under CUDA autocast if they are `exact`.
    """

    centering: Centre
    temperature: float
    log_normalizer: Tensor
    exact: bool

    @torch.no_grad()
    def targets(self, teacher: Tensor | HeadOutput) -> Tensor:
        """The teacher's probabilities (..., K), Eq. 7; the centre stays as it is."""
        with self._precision(features_of(teacher).device):
            scores = at_least_float32(teacher) if isinstance(teacher, Tensor) else scores_of(teacher)
        offset = self.log_normalizer - self.centering.offset(self.temperature)
        return torch.softmax(scores / self.temperature + offset, dim=-1)

    def accumulate_(self, teacher: Tensor | HeadOutput) -> None:
        """Add this to what the centre's next step averages; of a `HeadOutput` few rows have scores at a time."""
        with self._precision(features_of(teacher).device):
            self.centering.add_(teacher, self.temperature, self.log_normalizer)

    def cross_entropy(
        self,
        student: HeadOutput,
        teacher: HeadOutput,
        student_head: VMFPrototypeHead,
        *,
        targets: Tensor | None,
        weights: Tensor,
    ) -> Tensor:
        """`prototype_cross_entropy` of all these rows, which enter the centre's next step as in `accumulate_`."""
        centering = self.centering
        with self._precision(student.features.device):
            loss, log_sum, rows = prototype_cross_entropy(
                student.features,
                student.directions,
                teacher.features,
                teacher.directions,
                student_scale=student.scales,
                teacher_scale=teacher.scales,
                student_temperature=student_head.temperature,
                teacher_temperature=self.temperature,
                student_log_normalizer=student_head.log_normalizer(student_head.temperature, student.norms),
                teacher_log_normalizer=self.log_normalizer,
                log_center=centering.offset(self.temperature),
                targets=targets,
                weights=weights,
                center_on=centering.center_on if isinstance(centering, ProbabilityCentre) else "scores",
            )
        if isinstance(centering, ProbabilityCentre):
            centering.accumulate_(log_sum, rows)
        else:
            self.accumulate_(teacher)
        return loss

    def _precision(self, device: torch.device) -> AbstractContextManager[None]:
        return without_autocast(device) if self.exact else nullcontext()


def features_of(output: Tensor | HeadOutput) -> Tensor:
    """The tensor of rows that a head returned, whatever came along with it."""
    return output.features if isinstance(output, HeadOutput) else output


def with_prototypes(output: Tensor | HeadOutput, layer: Prototypes) -> HeadOutput:
    """`output` with the prototypes it belongs to, which are read from the layer when they did not come along."""
    return output if isinstance(output, HeadOutput) else HeadOutput(output, layer.weight_v, layer.scales)
