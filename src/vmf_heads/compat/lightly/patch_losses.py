"""lightly's losses on patch tokens: iBOT's on masked ones, iBOT++ on all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..._checks import at_least, one_of, positive
from ..._matmul import at_least_float32
from ...centering import ProbabilityCentering
from ...prototypes import HeadOutput
from ...teacher import features_of
from .._attached import SingleCenterLoss, check_not_empty, joined

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Center:
    """The centre of a loss by the names that it has in lightly."""

    def __init__(self, loss: IBOTPatchLoss) -> None:
        self._loss = loss

    @property
    def value(self) -> Any:
        """The centre: `log_center` (K,) with probability centring, `center` (1, K) with logit centring."""
        centering = self._loss.centering
        return centering.log_center if isinstance(centering, ProbabilityCentering) else centering.center

    @property
    def center(self) -> Any:
        """The buffer, with logit centring only; in the state dict it is `center.center`."""
        return self._loss.centering.center

    def update(self) -> None:
        """`update_center` of the loss."""
        self._loss.update_center()


class IBOTPatchLoss(SingleCenterLoss):
    """lightly's iBOT loss for vMF heads: cross-entropy of the masked patches, averaged per image, then over images.

    Equals, for teacher probabilities P_t and student probabilities P_s of the masked patches, (N, K) each, and the
    number n of masked patches of each one's image::

        ((-P_t * log(P_s)).sum(dim=1) / n).sum() / batch_size

    followed by one update of the centre with the teacher's scores of this batch. With heads of prototype norm 1 and
    centering="logit" it is lightly's own loss.

    Args:
        output_dim: number of prototypes K.
        teacher_temp: the teacher's temperature; a call may give another one.
        student_temp: the student's temperature.
        center_mode: "mean", the only one there is in lightly.
        center_momentum: momentum of the centre.
        centering: "probability" is Eq. 9; "logit" is DINO's Eq. 8 on logits with log C_p.
        center_on: see `ProbabilityCentering`; for centering="probability" only.
        center_start: "zeros", or "first_batch": the first update sets the centre.
        process_group: the ranks that share one centre; None means all of them.
        fused: compute loss and gradients from features with `prototype_cross_entropy`, without any logits. Same numbers
            to rounding, a fraction of the memory; attached heads then return features.

    `attach(student, teacher, head="ibot_head")` must be called once. State dict: `log_center` (K,) with probability
    centring; `center.center` (1, K), as in lightly, with logit centring. A lightly checkpoint's loads into either.

    Raises:
        ValueError, TypeError: an argument is out of its range or an output has the wrong shape.
        RuntimeError: called before `attach`.

    Reference: Govindarajan et al., ICLR 2023, Eq. 6, 7, 9 and appendix A.5; Zhou et al., ICLR 2022.

    >>> import torch
    >>> from vmf_heads.compat.lightly import DINOv2ProjectionHead, IBOTPatchLoss
    >>> student, teacher = (DINOv2ProjectionHead(16, 16, 8, 32) for _ in range(2))
    >>> criterion = IBOTPatchLoss(output_dim=32)
    >>> criterion.attach(student, teacher)
    >>> patches, mask = torch.randn(5, 3, 3, 16), torch.rand(5, 3, 3) < 0.3  # of 5 images
    >>> criterion(teacher(patches[mask]), student(patches[mask]), mask).shape
    torch.Size([])
    """

    STATE_NAMES: ClassVar[dict[str, str]] = SingleCenterLoss.STATE_NAMES | {"teacher.center": "center.center"}

    def __init__(
        self,
        output_dim: int = 65536,
        teacher_temp: float = 0.04,
        student_temp: float = 0.1,
        center_mode: str = "mean",
        center_momentum: float = 0.9,
        *,
        centering: str = "probability",
        center_on: str = "responsibilities",
        center_start: str = "zeros",
        process_group: ProcessGroup | None = None,
        fused: bool = False,
    ) -> None:
        at_least("output_dim", output_dim, 1)
        one_of("center_mode", center_mode, ("mean",))
        super().__init__(
            output_dim,
            student_temp,
            center_momentum,
            (1, output_dim),
            centering,
            center_on,
            center_start,
            process_group,
            fused=fused,
        )
        self.teacher_temp = positive("teacher_temp", teacher_temp)

    @property
    def center(self) -> Center:
        """What lightly's `center` is for: `value`, and `update()` for what was accumulated."""
        return Center(self)

    @torch.no_grad()
    def update_center(self) -> None:
        """One step of Eq. 9 or Eq. 8 from what was accumulated since the last, over all ranks."""
        self.teacher.commit_()

    def forward(
        self,
        teacher_out: Tensor | HeadOutput,
        student_out: Tensor | HeadOutput,
        mask: Tensor,
        teacher_temp: float | None = None,
        *,
        update_center: bool = True,
    ) -> Tensor:
        """The loss of the masked patches (N, K), in the order of `mask` (B, H, W), bool, with N patches True.

        Then the centre is updated. With fused=True the patches are features (N, p). The teacher's temperature is
        `teacher_temp` or the constructor's. With gradients accumulated over micro-batches, update_center=False in each,
        and `update_center()` once per step, makes one update from all of them.
        """
        teacher = features_of(teacher_out)
        if teacher.dim() != 2:
            raise ValueError(f"`teacher_out` (of shape {tuple(teacher.shape)}) must be (N, {self._columns})")
        if mask.dim() != 3 or mask.dtype != torch.bool:
            raise ValueError(f"`mask` (of shape {tuple(mask.shape)}, {mask.dtype}) must be (B, H, W) bool")
        check_not_empty("mask", mask)
        weights = (1 / mask.sum(dim=(1, 2), keepdim=True).clamp(min=1).double()).expand_as(mask)[mask]
        if len(weights) != len(teacher):
            raise ValueError(
                f"`mask` (with {len(weights)} patches True) must have one for each of the {len(teacher)} rows of "
                "`teacher_out`"
            )
        return self._loss(teacher_out, student_out, weights / len(mask), teacher_temp, update_center)

    def _loss(
        self,
        teacher_out: Tensor | HeadOutput,
        student_out: Tensor | HeadOutput,
        weights: Tensor,
        teacher_temp: float | None,
        update_center: bool,
    ) -> Tensor:
        """The sum of weights (...,) times -sum_k P_t log P_s of outputs (..., K); then the update of the centre."""
        temperature = self.teacher_temp if teacher_temp is None else positive("teacher_temp", teacher_temp)
        teacher, student = features_of(teacher_out), features_of(student_out)
        if student.shape != teacher.shape:
            raise ValueError(
                f"`student_out` (of shape {tuple(student.shape)}) must have the shape of `teacher_out` "
                f"(={tuple(teacher.shape)})"
            )
        self._check_columns("teacher_out", teacher)
        self.teacher.check_outputs(teacher, student)
        if self.fused:
            student_layer, teacher_layer = self.teacher.layers
            loss = self.teacher.at(temperature).cross_entropy(
                joined([student_out], student_layer),
                joined([teacher_out], teacher_layer),
                self.student_temp,
                teacher_rows=None,
                weights=weights.reshape(-1, 1),
            )
        else:
            targets = self._targets("teacher_out", teacher, temperature)
            log_probabilities = torch.log_softmax(at_least_float32(student) / self.student_temp, dim=-1)
            losses = -(targets * log_probabilities).sum(dim=-1)
            loss = (losses * weights.to(losses.dtype)).sum()
            self._accumulate("teacher_out", teacher, temperature)
        if update_center:
            self.teacher.commit_()
        return loss


class IBOTPlusPlusPatchLoss(IBOTPatchLoss):
    """lightly's iBOT++ loss for vMF heads: the masked patches as in `IBOTPatchLoss`, and the visible ones, too.

    Experimental: the paper has iBOT only. Arguments, `attach` and state are those of `IBOTPatchLoss`.

    Reference: lightly, after TIPSv2 (2026); Govindarajan et al., ICLR 2023, Eq. 6, 7 and 9.
    """

    def forward(
        self,
        teacher_out: Tensor | HeadOutput,
        student_out: Tensor | HeadOutput,
        mask: Tensor | None = None,
        teacher_temp: float | None = None,
        visible_loss_weight: float = 1.0,
        *,
        update_center: bool = True,
    ) -> Tensor:
        """The loss of all patches, (B, N, K) or (B * N, K); then the centre is updated.

        With a `mask`, (B, H, W) or (B, N), True where a patch is masked: the mean over the masked patches of an image,
        plus `visible_loss_weight` times that over its visible ones, averaged over images; 0 is `IBOTPatchLoss` on all
        patches. Without one: the mean over all patches, which must then be (B, N, K). With fused=True p takes the place
        of K.
        """
        shape = features_of(teacher_out).shape
        if len(shape) not in (2, 3) or (len(shape) == 2 and mask is None):
            raise ValueError(
                f"`teacher_out` (of shape {tuple(shape)}) must be (B, N, {self._columns}), or "
                f"(B * N, {self._columns}) together with a `mask`"
            )
        check_not_empty("teacher_out", teacher_out)
        patches = shape[:-1].numel()
        if mask is not None and (mask.dtype != torch.bool or mask.numel() != patches or len(mask) == 0):
            raise ValueError(
                f"`mask` (of shape {tuple(mask.shape)}, {mask.dtype}) must be (B, H, W) or (B, N) bool, one for each "
                f"of the {patches} patches of `teacher_out`"
            )
        if mask is not None and len(shape) == 3 and len(mask) != shape[0]:
            raise ValueError(f"`mask` (of {len(mask)} images) must be of the {shape[0]} of `teacher_out`")
        if mask is None:
            weights = torch.full(shape[:-1], 1 / patches, dtype=torch.float64, device=features_of(teacher_out).device)
        else:
            masked = mask.flatten(1)
            weights = _weights_of_means(masked) + visible_loss_weight * _weights_of_means(~masked)
        return self._loss(teacher_out, student_out, weights.view(shape[:-1]), teacher_temp, update_center)


def _weights_of_means(mask: Tensor) -> Tensor:
    """What each patch (B, N) counts in the mean over images of the mean over an image's patches in the mask."""
    return mask.double() / mask.sum(dim=1, keepdim=True).clamp(min=1) / len(mask)
