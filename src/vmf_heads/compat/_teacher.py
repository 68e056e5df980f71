"""The teacher's temperature, log C_p and centre for one term of a loss: Eq. 7, Eq. 9, and the fused cross-entropy."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .._matmul import without_autocast
from ..centering import Centering, ProbabilityCentering, teacher_targets
from ..cross_entropy import prototype_cross_entropy
from ..head import PrototypeHead
from ..prototypes import HeadOutput, PrototypeLayer


@dataclass(frozen=True)
class TeacherSide:
    """How what the teacher's head returned is read at one moment of training.

    That is raw scores (..., K), or a `HeadOutput` whose products they are.

    Attributes:
        centering: the centre.
        temperature: the teacher's temperature.
        head: the teacher's head, which says how kappa is normalised.
        layer: the prototypes in it that this term of the loss compares with.
    """

    centering: Centering
    temperature: float
    head: PrototypeHead
    layer: PrototypeLayer

    @cached_property
    def log_normalizer(self) -> Tensor:
        """log C_p (K,) of the teacher's prototypes at this temperature, up to a constant; under FSDP2 a collective."""
        return self.head.log_normalizer(self.temperature, self.layer.gathered_norms())

    @torch.no_grad()
    def targets(self, teacher: Tensor | HeadOutput) -> Tensor:
        """The teacher's probabilities (..., K), Eq. 7; the centre stays as it is."""
        scores = teacher if isinstance(teacher, Tensor) else teacher.scores(exact=self.head.float32_scores)
        return teacher_targets(
            scores,
            self.temperature,
            log_normalizer=self.log_normalizer,
            log_center=self.centering.offset(self.temperature),
        )

    def accumulate_(self, teacher: Tensor | HeadOutput) -> None:
        """Add this to what the centre's next step averages; of a `HeadOutput` few rows have scores at a time."""
        with self._precision(features_of(teacher).device):
            self.centering.accumulate_(teacher, self.temperature, log_normalizer=self.log_normalizer)

    def cross_entropy(
        self,
        student: HeadOutput,
        teacher: HeadOutput,
        student_temperature: float,
        *,
        teacher_rows: Tensor | None,
        weights: Tensor,
    ) -> Tensor:
        """`prototype_cross_entropy` of all these rows, which enter the centre's next step as in `accumulate_`."""
        with self._precision(student.features.device):
            loss, log_sum, rows = prototype_cross_entropy(
                student,
                teacher,
                student_temperature=student_temperature,
                teacher_temperature=self.temperature,
                normalizer=self.head.normalizer,
                log_center=self.centering.offset(self.temperature),
                teacher_rows=teacher_rows,
                weights=weights,
                center_on=self.centering.center_on,
            )
        if isinstance(self.centering, ProbabilityCentering):  # its statistics came along with the loss
            self.centering.convert_logit_center_(self.temperature)
            self.centering.accumulate_log_sum_(log_sum, rows)
        else:
            self.accumulate_(teacher)
        return loss

    def _precision(self, device: torch.device) -> AbstractContextManager[None]:
        return without_autocast(device) if self.head.float32_scores else nullcontext()


def features_of(output: Tensor | HeadOutput) -> Tensor:
    """The tensor of rows that a head returned, whatever came along with it."""
    return output.features if isinstance(output, HeadOutput) else output


def with_prototypes(output: Tensor | HeadOutput, layer: PrototypeLayer) -> HeadOutput:
    """`output` with the prototypes it belongs to, which are read from the layer when they did not come along."""
    return output if isinstance(output, HeadOutput) else layer.with_features(output)
