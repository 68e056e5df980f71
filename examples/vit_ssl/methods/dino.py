"""DINO and DINO-vMF (Govindarajan et al., 2023): self-distillation over prototypes, with an EMA teacher."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from config.recipe import Recipe
from methods.method import Batch, Method, Statistics, centered_targets, sample_rows
from methods.network import build_network
from methods.statistics import center_entropy, target_statistics
from vmf_heads.compat.dino import DINOLoss
from vmf_heads.head import find_head


class DINO(Method):
    """Cross-entropy between the prototypes' probabilities of different crops of an image.

    The cells of Table 1 are `normalization` {none, l2, vmf} x `centering` {logit, probability}.
    """

    loss: DINOLoss

    def __init__(self, recipe: Recipe) -> None:
        loss = DINOLoss(
            recipe.out_dim,
            2 + recipe.num_local_crops,
            recipe.teacher_temp_warmup,
            recipe.teacher_temp,
            recipe.teacher_temp_warmup_epochs,
            recipe.epochs,
            student_temp=recipe.student_temp,
            center_momentum=recipe.center_momentum,
            centering=recipe.centering,
            center_on=recipe.center_on,
            fused=recipe.fused_loss,
        )
        super().__init__(recipe, lambda drop_path: build_network(recipe, drop_path=drop_path), loss)

    def attach(self) -> None:
        """Let the loss find the heads in student and teacher; once, after these were wrapped."""
        self.loss.attach(self.student, self.teacher)

    def forward_teacher(self, batch: Batch) -> Any:
        """Show the teacher the two global crops, the first of `batch["crops"]`, each (B, 3, h, w)."""
        return self.teacher(batch["crops"][:2])

    def forward_student(self, batch: Batch, epoch: int) -> Any:
        """Show the student all crops."""
        return self.student(batch["crops"])

    def compute_loss(
        self, student_output: Any, teacher_output: Any, batch: Batch, epoch: int, *, commit: bool = True
    ) -> tuple[Tensor, Statistics]:
        """See `Method.compute_loss`."""
        # Before the loss, which moves the centre.
        targets = self.loss.target_summary(sample_rows(teacher_output), epoch)
        loss = self.loss(student_output, teacher_output, epoch, commit=commit)
        statistics: Statistics = {"teacher_temp": float(self.loss.teacher_temp_schedule[epoch])}
        statistics |= target_statistics(targets, loss.detach())
        koleo, of_koleo = self.koleo((self.loss.teacher, student_output))
        if self.mixture is not None:
            self.mixture.collect(teacher_output)
        return loss + koleo, statistics | of_koleo | self.kappa_statistics()

    def targets(self, scores: Tensor, epoch: int) -> Tensor:
        """Return the targets of Eq. 7 (N, K) for raw scores (N, K)."""
        return centered_targets(self.loss, find_head(self.teacher), scores, epoch)

    def center_statistics(self, epoch: int) -> dict[str, Tensor]:
        """Return `center_entropy`, see `methods.statistics`."""
        return {"center_entropy": center_entropy(self.loss.centering, float(self.loss.teacher_temp_schedule[epoch]))}
