"""DINO-vMF inside facebookresearch/dino: `DINOHead` and `DINOLoss` with the original's names and signatures.

The change to main_dino.py, to be run with `--norm_last_layer false`::

    -from vision_transformer import DINOHead
    +from vmf_heads.compat.dino import DINOHead, DINOLoss as VMFDINOLoss

    -    dino_loss = DINOLoss(
    +    dino_loss = VMFDINOLoss(

    +    dino_loss.attach(student, teacher)     # after both are built and wrapped

(The alias is needed because main_dino.py defines its own class DINOLoss further down, which would shadow the import.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._checks import at_least
from .._matmul import at_least_float32
from ..cross_entropy import dino_pairs
from ..head import VMFPrototypeHead
from ..prototypes import HeadOutput
from ..teacher import TargetSummary, TeacherSide, TeacherTargets, features_of, with_prototypes
from ._attached import AttachedLoss, check_not_empty
from ._temperature import temperature_at, temperature_schedule

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["DINOHead", "DINOLoss"]

# The library's head has the constructor and the parameter names of DINO's; only norm_last_layer defaults to False.
DINOHead = VMFPrototypeHead


class DINOLoss(AttachedLoss):
    """The loss of DINO-vMF: cross-entropy between Eq. 7 of the teacher and Eq. 6 of the student, over pairs of crops.

    Equals, for student probabilities P_s[v] of crop v and teacher probabilities P_t[u] of global crop u, (B, K) each::

        loss, terms = 0, 0
        for u in range(2):
            for v in range(ncrops):
                if v != u:
                    loss += (-P_t[u] * log(P_s[v])).sum(dim=1).mean()
                    terms += 1
        loss / terms

    followed by one update of the centre with the teacher's scores of this batch. With heads of prototype norm 1 and
    centering="logit" it is DINO's own loss.

    Args:
        out_dim: number of prototypes K.
        ncrops: crops per image, the 2 global ones first.
        warmup_teacher_temp: the teacher's temperature at the start.
        teacher_temp: the teacher's temperature after its warm-up.
        warmup_teacher_temp_epochs: how many epochs the teacher's temperature rises linearly from one to the other.
        nepochs: the number of epochs of the training.
        student_temp: the student's temperature.
        center_momentum: momentum of the centre.
        centering: "probability" is Eq. 9; "logit" is DINO's Eq. 8 on logits with log C_p, for the ablation of Table 1.
        center_on: see `ProbabilityCentering`; for centering="probability" only.
        center_start: "zeros", or "first_batch": the first update sets the centre.
        fused: compute loss and gradients from features with `prototype_cross_entropy`, without the (N, K) logits. Same
            numbers to rounding, a fraction of the memory; attached heads then return features.
        process_group: the ranks that share one centre; None means all of them.

    `attach(student, teacher)` must be called once, after the models are built and wrapped: the loss owns both
    temperatures. State dict: `log_center` (K,) with probability centring; `center` (1, K), as in DINO, with logit
    centring. A DINO checkpoint's `center` loads into either.

    Raises:
        ValueError, TypeError: an argument is out of its range or an output has the wrong shape.
        RuntimeError: called before `attach`.

    Reference: Govindarajan et al., ICLR 2023, Eq. 6, 7, 8 and 9; Caron et al., ICCV 2021.

    >>> import torch
    >>> from vmf_heads.compat.dino import DINOHead, DINOLoss
    >>> student, teacher = (DINOHead(16, 32, hidden_dim=16, bottleneck_dim=8) for _ in range(2))
    >>> loss = DINOLoss(32, 4, 0.04, 0.07, warmup_teacher_temp_epochs=3, nepochs=10)
    >>> loss.attach(student, teacher)
    >>> crops = torch.randn(4 * 5, 16)  # 4 crops of 5 images, crop by crop; the teacher sees the first two
    >>> loss(student(crops), teacher(crops[: 2 * 5]), epoch=0).shape
    torch.Size([])
    """

    def __init__(
        self,
        out_dim: int,
        ncrops: int,
        warmup_teacher_temp: float,
        teacher_temp: float,
        warmup_teacher_temp_epochs: int,
        nepochs: int,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        *,
        centering: str = "probability",
        center_on: str = "responsibilities",
        center_start: str = "zeros",
        fused: bool = False,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(
            TeacherTargets(
                at_least("out_dim", out_dim, 1),
                student_temp,
                center_momentum,
                centering=centering,
                center_on=center_on,
                center_start=center_start,
                fused=fused,
                process_group=process_group,
            )
        )
        self.num_prototypes = out_dim
        self.ncrops = at_least("ncrops", ncrops, 2)
        self.center_momentum = center_momentum
        self.teacher_temp_schedule = temperature_schedule(
            warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs, nepochs
        )

    def forward(
        self,
        student_output: Tensor | HeadOutput,
        teacher_output: Tensor | HeadOutput,
        epoch: int,
        *,
        commit: bool = True,
    ) -> Tensor:
        """The loss of what the attached heads returned: (ncrops * B, K) and (2 * B, K) logits, crop by crop.

        Then the centre is updated. With fused=True both are features (..., p). When gradients are accumulated over
        micro-batches, commit=False on all but the last makes one update from all of them.
        """
        images = self._check_rows(student_output, teacher_output)
        teacher, side = self._read(teacher_output, epoch)
        self.teacher.check_outputs(teacher_output, student_output)
        if isinstance(teacher, HeadOutput):
            student = with_prototypes(student_output, self._attached()[0].last_layer)
            pairs, weights = dino_pairs(images, self.ncrops, device=student.features.device)
            loss = side.cross_entropy(student, teacher, self.student_temp, teacher_rows=pairs, weights=weights)
        else:
            loss = self._cross_entropy(features_of(student_output), side.targets(teacher))
            side.accumulate_(teacher)
        if commit:
            self.teacher.commit_()
        return loss

    @torch.no_grad()
    def targets(self, teacher_output: Tensor | HeadOutput, epoch: int) -> Tensor:
        """The teacher's probabilities P_t (N, K) for any N rows of its output, Eq. 7; the centre stays as it is."""
        teacher, side = self._read(teacher_output, epoch)
        return side.targets(teacher)

    @torch.no_grad()
    def target_summary(self, teacher_output: Tensor | HeadOutput, epoch: int) -> TargetSummary:
        """Entropies and use of what `targets` returns, for a log; the centre stays as it is."""
        teacher, side = self._read(teacher_output, epoch)
        return side.summary(teacher)

    @torch.no_grad()
    def update_center(self, teacher_output: Tensor | HeadOutput, epoch: int, *, commit: bool = True) -> None:
        """One step of Eq. 9 ("probability") or Eq. 8 ("logit") from this batch, over all ranks; `forward` calls it.

        commit=False only adds the batch to those that the next step will average.
        """
        teacher, side = self._read(teacher_output, epoch)
        side.accumulate_(teacher)
        if commit:
            self.teacher.commit_()

    def _check_rows(self, student_output: Tensor | HeadOutput, teacher_output: Tensor | HeadOutput) -> int:
        """The number of images in a batch, or an error if the outputs do not have the same."""
        check_not_empty("teacher_output", teacher_output)
        student_rows, teacher_rows = len(features_of(student_output)), len(features_of(teacher_output))
        if teacher_rows % 2 or student_rows * 2 != teacher_rows * self.ncrops:
            raise ValueError(
                f"`student_output` (of {student_rows} rows) must have `ncrops` (={self.ncrops}) rows per image and "
                f"`teacher_output` (of {teacher_rows} rows) 2, crop by crop"
            )
        return teacher_rows // 2

    def _cross_entropy(self, student_logits: Tensor, targets: Tensor) -> Tensor:
        logits = at_least_float32(student_logits) / self.student_temp
        total = logits.new_zeros(())
        for v, log_probabilities in enumerate(crop.log_softmax(dim=1) for crop in logits.chunk(self.ncrops)):
            for u, target in enumerate(targets.chunk(2)):
                if u != v:  # the same view of the same image teaches nothing
                    total = total - (target * log_probabilities).sum(dim=1).mean()
        return total / (2 * self.ncrops - 2)

    @torch.no_grad()
    def _read(self, output: Tensor | HeadOutput, epoch: int) -> tuple[Tensor | HeadOutput, TeacherSide]:
        """The teacher's output, with its prototypes if `fused`, and how it is read at this epoch."""
        head = self._attached()[1]
        columns = head.bottleneck_dim if self.fused else self.num_prototypes
        shape = features_of(output).shape
        if shape[1:] != (columns,):
            raise ValueError(f"`teacher_output` (of shape {tuple(shape)}) must be (N, {columns})")
        side = self.teacher.at(temperature_at(self.teacher_temp_schedule, epoch))
        return (with_prototypes(output, side.layer) if self.fused else features_of(output)), side
