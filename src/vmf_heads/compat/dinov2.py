"""DINOv2 with vMF prototypes: `DINOHead`, `DINOLoss` and `iBOTPatchLoss` with the original's names and signatures.

Experimental: the paper has DINO and iBOT only. The change to dinov2/train/ssl_meta_arch.py::

    -from dinov2.layers import DINOHead
    +from vmf_heads.compat.dinov2 import DINOHead, DINOLoss, iBOTPatchLoss

    +self.dino_loss.attach(self.student, self.teacher)                            # once both exist
    +self.ibot_patch_loss.attach(self.student, self.teacher)

(The import must come after that of `dinov2.loss`, whose names it replaces.)

With `train.centering: centering` the teacher follows Eq. 7 and Eq. 9. With `sinkhorn_knopp` (the ViT-L and ViT-g
configurations) only the student's Eq. 6 is left: Sinkhorn-Knopp removes the teacher's log C_p exactly.

With `fused=True` heads return features and no logits exist. What stands for targets are then the teacher's features,
which the loss reads as the last `softmax_center_teacher` or `sinkhorn_knopp_teacher` says; code that views, slices and
concatenates them, as DINOv2's does, stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._matmul import at_least_float32
from ..head import VMFPrototypeHead
from ..prototypes import HeadOutput
from ..teacher import features_of
from ._attached import check_not_empty, rows_of
from ._late_center import LateCenterLoss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["DINOHead", "DINOLoss", "iBOTPatchLoss"]


class DINOHead(VMFPrototypeHead):
    """DINOv2's head with log C_p of each prototype in its logits; see `VMFPrototypeHead`. Experimental.

    Parameter names and order are DINOv2's: `mlp.*`, `last_layer.weight_g`, `last_layer.weight_v`. As there, the norms
    always learn. Features, scores and logits are float32 whatever the precision of the parameters.

    >>> import torch
    >>> from vmf_heads.compat.dinov2 import DINOHead
    >>> DINOHead(32, 100, hidden_dim=16, bottleneck_dim=8)(torch.randn(4, 32)).shape
    torch.Size([4, 100])
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        use_bn: bool = False,
        nlayers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        mlp_bias: bool = True,
        *,
        temperature: float = 0.1,
        normalizer: str = "vmf",
    ) -> None:
        super().__init__(
            in_dim,
            out_dim,
            use_bn=use_bn,
            nlayers=max(nlayers, 1),
            hidden_dim=hidden_dim,
            bottleneck_dim=bottleneck_dim,
            mlp_bias=mlp_bias,
            temperature=temperature,
            normalizer=normalizer,
        )


class DINOLoss(LateCenterLoss):
    """DINOv2's loss on [CLS] tokens for vMF heads. Experimental.

    With heads of prototype norm 1 and centering="logit" (or under Sinkhorn-Knopp) it is DINOv2's own loss.

    Args:
        out_dim: number of prototypes K.
        student_temp: the student's temperature.
        center_momentum: momentum of the centre.
        centering: "probability" is Eq. 9; "logit" is DINO's Eq. 8 on logits with log C_p.
        center_on: see `ProbabilityCentering`; for centering="probability" only.
        center_start: "zeros", or "first_batch": the first update sets the centre.
        process_group: the ranks that share one centre; None means all of them.
        fused: compute loss and gradients from features with `prototype_cross_entropy`, without any logits. Same numbers
            to rounding, a fraction of the memory; attached heads then return features.

    `attach(student, teacher)` must be called once. State dict: `log_center` (K,) with probability
    centring; `center` (1, K), as in DINOv2, with logit centring. A DINOv2 checkpoint's `center` loads into either.

    Raises:
        ValueError, TypeError: an argument is out of its range or a tensor has the wrong shape.
        RuntimeError: called before `attach`.

    Reference: Oquab et al., TMLR 2024; Govindarajan et al., ICLR 2023, Eq. 6, 7, 8 and 9.

    >>> import torch
    >>> from vmf_heads.compat.dinov2 import DINOHead, DINOLoss
    >>> student, teacher = (DINOHead(16, 32, hidden_dim=16, bottleneck_dim=8) for _ in range(2))
    >>> loss = DINOLoss(32)
    >>> loss.attach(student, teacher)
    >>> crops = torch.randn(2, 5, 16)
    >>> targets = loss.softmax_center_teacher(teacher(crops), teacher_temp=0.04)
    >>> loss.update_center(teacher(crops))
    >>> loss([student(crop) for crop in crops], targets).shape
    torch.Size([])
    """

    def __init__(
        self,
        out_dim: int,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        *,
        centering: str = "probability",
        center_on: str = "responsibilities",
        center_start: str = "zeros",
        process_group: ProcessGroup | None = None,
        fused: bool = False,
    ) -> None:
        super().__init__(
            out_dim,
            student_temp,
            center_momentum,
            (1, out_dim),
            centering,
            center_on,
            center_start,
            process_group,
            fused=fused,
        )

    def attach(self, student: nn.Module, teacher: nn.Module, head: str | None = None) -> None:
        """As in `TeacherTargets.attach`; without `head` it is the student's "dino_head", or the only one there is."""
        super().attach(student, teacher, _existing("dino_head", student) if head is None else head)

    @torch.no_grad()
    def sinkhorn_knopp_teacher(
        self, teacher_output: Tensor | HeadOutput, teacher_temp: float, n_iterations: int = 3
    ) -> Any:
        """The teacher's assignments (N, K) by Sinkhorn-Knopp over all ranks, for logits of any size.

        With fused=True the output, features (N, p), comes back as it is, to be read this way by the loss.
        """
        return self._sinkhorn_knopp(teacher_output, teacher_temp, n_iterations)

    def forward(
        self,
        student_output_list: Sequence[Tensor | HeadOutput],
        teacher_out_softmaxed_centered_list: Sequence[Tensor | HeadOutput] | Tensor,
    ) -> Tensor:
        """The cross-entropies, averaged over the batch and summed over all pairs of a student's and a teacher's crop.

        Both are sequences of (B, K), or the teacher's a tensor (crops, B, K): logits and probabilities. With fused=True
        all are features (B, p).
        """
        if isinstance(student_output_list, Tensor):
            raise TypeError(
                f"`student_output_list` (a tensor of shape {tuple(student_output_list.shape)}) must be a sequence of "
                "(B, K), one for each crop: every crop meets every target here, and the pairs are summed. The mean "
                "over pairs of different views, which stable-pretraining calls with tensors, is "
                "vmf_heads.compat.stable_pretraining.DINOv1Loss"
            )
        teacher = list(teacher_out_softmaxed_centered_list)
        targets, logits = [features_of(t) for t in teacher], [features_of(s) for s in student_output_list]
        if not teacher or any(t.shape != s.shape for t in targets for s in logits):
            raise ValueError(
                f"`teacher_out_softmaxed_centered_list` (of shapes {[tuple(t.shape) for t in targets]}) must hold the "
                f"shapes of `student_output_list` (={[tuple(s.shape) for s in logits]})"
            )
        check_not_empty("teacher_out_softmaxed_centered_list", teacher[0])
        if self.fused:
            rows = torch.arange(len(targets) * len(targets[0]), device=targets[0].device).view(len(targets), -1).T
            weights = rows.new_full((len(logits) * len(rows), len(targets)), 1 / len(rows), dtype=torch.float64)
            return self._cross_entropy_fused(student_output_list, teacher, weights, rows.repeat(len(logits), 1))
        total_target = sum(targets[1:], start=targets[0])  # each student's crop meets every target
        total = total_target.new_zeros(())
        for crop in logits:
            total = total - (total_target * self._log_student("student_output_list", crop)).sum(dim=-1).mean()
        return total


class iBOTPatchLoss(LateCenterLoss):
    """DINOv2's loss on masked patches for vMF heads. Experimental.

    With heads of prototype norm 1 and centering="logit" (or under Sinkhorn-Knopp) it is DINOv2's own loss.

    Args:
        patch_out_dim: number of prototypes K.
        student_temp: the student's temperature.
        center_momentum: momentum of the centre.
        centering: "probability" is Eq. 9; "logit" is DINO's Eq. 8 on logits with log C_p.
        center_on: see `ProbabilityCentering`; for centering="probability" only.
        center_start: "zeros", or "first_batch": the first update sets the centre.
        process_group: the ranks that share one centre; None means all of them.
        fused: as in `DINOLoss`; only the rows that count are computed.

    `attach(student, teacher)` must be called once. State dict: `log_center` (K,) with probability centring; `center`
    (1, 1, K), as in DINOv2, with logit centring.

    Raises:
        ValueError, TypeError: an argument is out of its range or a tensor has the wrong shape.
        RuntimeError: called before `attach`.

    Reference: Oquab et al., TMLR 2024; Govindarajan et al., ICLR 2023, Eq. 6, 7 and 9, appendix A.5.
    """

    def __init__(
        self,
        patch_out_dim: int,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        *,
        centering: str = "probability",
        center_on: str = "responsibilities",
        center_start: str = "zeros",
        process_group: ProcessGroup | None = None,
        fused: bool = False,
    ) -> None:
        super().__init__(
            patch_out_dim,
            student_temp,
            center_momentum,
            (1, 1, patch_out_dim),
            centering,
            center_on,
            center_start,
            process_group,
            fused=fused,
        )

    def attach(self, student: nn.Module, teacher: nn.Module, head: str | None = None) -> None:
        """As in `TeacherTargets.attach`; without `head` it is the student's "ibot_head", or the only one there is."""
        super().attach(student, teacher, _existing("ibot_head", student) if head is None else head)

    @torch.no_grad()
    def sinkhorn_knopp_teacher(
        self,
        teacher_output: Tensor | HeadOutput,
        teacher_temp: float,
        n_masked_patches_tensor: Tensor | None = None,
        n_iterations: int = 3,
    ) -> Any:
        """The teacher's assignments (N, K) by Sinkhorn-Knopp over all ranks, for logits of any size.

        With fused=True the output, features (N, p), comes back as it is, to be read this way by the loss.
        `n_masked_patches_tensor`, the number of samples, cancels and is left as it is.
        """
        return self._sinkhorn_knopp(teacher_output, teacher_temp, n_iterations)

    def forward(
        self,
        student_patch_tokens: Tensor | HeadOutput,
        teacher_patch_tokens: Tensor | HeadOutput,
        student_masks_flat: Tensor,
    ) -> Tensor:
        """The loss of all patches: logits and targets (B, N, K), mask (B, N) that is True where a patch counts.

        With fused=True both are features (B, N, p).
        """
        shape = features_of(student_patch_tokens).shape
        if student_masks_flat.shape != shape[:-1]:
            raise ValueError(
                f"`student_masks_flat` (of shape {tuple(student_masks_flat.shape)}) must be "
                f"(B, N) of `student_patch_tokens` (={tuple(shape[:-1])})"
            )
        self._check_same("student_patch_tokens", student_patch_tokens, teacher_patch_tokens)
        check_not_empty("student_masks_flat", student_masks_flat)
        mask = student_masks_flat.float()
        per_image = mask.sum(dim=-1, keepdim=True).clamp(min=1.0)
        if self.fused:
            counts = student_masks_flat.bool()
            student, teacher = rows_of(student_patch_tokens, counts), rows_of(teacher_patch_tokens, counts)
            return self._cross_entropy_fused(
                [student], [teacher], (mask / per_image.double() / len(mask))[counts][:, None]
            )
        losses = self._cross_entropy("student_patch_tokens", student_patch_tokens, teacher_patch_tokens)
        return ((losses * mask).sum(dim=-1) / per_image.squeeze(-1)).mean()

    def forward_masked(
        self,
        student_patch_tokens_masked: Tensor | HeadOutput,
        teacher_patch_tokens_masked: Tensor | HeadOutput,
        student_masks_flat: Tensor,
        n_masked_patches: int | None = None,
        masks_weight: Tensor | None = None,
    ) -> Tensor:
        """The loss of the masked patches alone: logits and targets (M, K), mask (B, N) with M patches True.

        `n_masked_patches`: the rows that are patches, the rest is padding. `masks_weight` (M,): 1 over the number of
        masked patches of the patch's image, computed from the mask if None. With fused=True logits and targets are
        features (M, p).
        """
        check_not_empty("student_masks_flat", student_masks_flat)
        name = "student_patch_tokens_masked"
        self._check_same(name, student_patch_tokens_masked, teacher_patch_tokens_masked)
        if masks_weight is None:
            per_image = student_masks_flat.sum(dim=-1, keepdim=True).clamp(min=1.0)
            masks_weight = (1 / per_image).expand_as(student_masks_flat)[student_masks_flat]
        patches = slice(n_masked_patches)
        student = rows_of(student_patch_tokens_masked, patches)
        teacher = rows_of(teacher_patch_tokens_masked, patches)
        if len(features_of(student)) != len(masks_weight):
            raise ValueError(
                f"`{name}` (with {len(features_of(student))} patches) must hold as many as `masks_weight`, or the "
                f"mask, has (={len(masks_weight)})"
            )
        if self.fused:
            return self._cross_entropy_fused(
                [student], [teacher], masks_weight.double()[:, None] / len(student_masks_flat)
            )
        return (self._cross_entropy(name, student, teacher) * masks_weight).sum() / len(student_masks_flat)

    def _check_same(self, name: str, student: Tensor | HeadOutput, teacher: Tensor | HeadOutput) -> None:
        shape, expected = features_of(teacher).shape, features_of(student).shape
        if shape != expected:
            raise ValueError(
                f"`{name.replace('student', 'teacher')}` (of shape {tuple(shape)}) must have the shape of "
                f"`{name}` (={tuple(expected)})"
            )

    def _cross_entropy(self, name: str, logits: Tensor | HeadOutput, targets: Tensor | HeadOutput) -> Tensor:
        log_p = self._log_student(name, features_of(logits))
        return -(at_least_float32(features_of(targets)) * log_p).sum(dim=-1)


def _existing(name: str, model: nn.Module) -> str | None:
    """`name`, if a submodule of `model` has it."""
    paths = (path for path, _ in model.named_modules(remove_duplicate=False))
    return name if any(path.rpartition(".")[2] == name for path in paths) else None
