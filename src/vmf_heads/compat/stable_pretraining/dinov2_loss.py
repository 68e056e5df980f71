"""stable-pretraining's DINOv2 loss, the weighted sum of the other two."""

from __future__ import annotations

from torch import Tensor, nn

from .dino_loss import DINOv1Loss
from .patch_loss import iBOTPatchLoss

__all__ = ["DINOv2Loss"]


class DINOv2Loss(nn.Module):
    """stable-pretraining's DINOv2 loss for vMF heads: `dino_loss` on [CLS] tokens, `ibot_loss` on patches.

    Experimental. Attach both: `loss.dino_loss.attach(...)` to the heads of [CLS] tokens, `loss.ibot_loss.attach(...)`
    to those of patches.

    Args:
        dino_loss_weight: weight of the [CLS] objective.
        ibot_loss_weight: weight of the patch objective.
        temperature_student: the student's temperature for [CLS] tokens.
        center_momentum: momentum of the centre, which Sinkhorn-Knopp does not use.
        student_temp: the student's temperature for patches.
        fused: as in `DINOv1Loss`, for both.

    Reference: Govindarajan et al., ICLR 2023, Eq. 6; Oquab et al., TMLR 2024.
    """

    def __init__(
        self,
        dino_loss_weight: float = 1.0,
        ibot_loss_weight: float = 1.0,
        temperature_student: float = 0.1,
        center_momentum: float = 0.9,
        student_temp: float = 0.1,
        *,
        fused: bool = False,
    ) -> None:
        super().__init__()
        self.dino_loss_weight = dino_loss_weight
        self.ibot_loss_weight = ibot_loss_weight
        self.dino_loss = DINOv1Loss(temperature_student, center_momentum, fused=fused)
        self.ibot_loss = iBOTPatchLoss(student_temp, fused=fused)

    def forward(
        self,
        student_cls_logits: Tensor,
        teacher_cls_probs: Tensor,
        student_patch_logits: Tensor | None = None,
        teacher_patch_probs: Tensor | None = None,
    ) -> Tensor:
        """The weighted sum of both; without patches that of the first alone."""
        loss = self.dino_loss_weight * self.dino_loss(student_cls_logits, teacher_cls_probs)
        if student_patch_logits is None or teacher_patch_probs is None:
            return loss
        return loss + self.ibot_loss_weight * self.ibot_loss(student_patch_logits, teacher_patch_probs)
