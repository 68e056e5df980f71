"""stable-pretraining's loss on masked patches for heads with log C_p in their logits."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..._attached import AttachedHeads
from ..._checks import positive
from ..._matmul import at_least_float32, without_autocast
from ...cross_entropy import prototype_cross_entropy
from ...teacher import with_prototypes
from .._attached import check_not_empty
from .._sinkhorn import prototype_offsets_of_features, sinkhorn_knopp

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["iBOTPatchLoss"]


class iBOTPatchLoss(nn.Module):
    """stable-pretraining's loss on masked patches for vMF heads, by Sinkhorn-Knopp alone. Experimental.

    Equals (-teacher_patch_probs * log_softmax(student_patch_logits / student_temp, dim=1)).sum(dim=1).mean(). What vMF
    changes is the student's Eq. 6: Sinkhorn-Knopp removes the teacher's log C_p exactly, and there is no centre.

    Args:
        student_temp: the student's temperature.
        process_group: the ranks that share the assignments; None means all of them.
        fused: as in `DINOv1Loss`.

    `attach(student, teacher)` must be called once. No state.

    Raises:
        ValueError, TypeError: an argument is out of its range or a tensor has the wrong shape.
        RuntimeError: called before `attach`.

    Reference: Govindarajan et al., ICLR 2023, Eq. 6 and appendix A.5; Zhou et al., ICLR 2022.
    """

    # With fused=True: at which temperature, and less which offsets (K,), the teacher's features are read.
    _reading: tuple[float, Tensor] | None = None

    def __init__(
        self, student_temp: float = 0.1, *, process_group: ProcessGroup | None = None, fused: bool = False
    ) -> None:
        super().__init__()
        self.student_temp = student_temp
        self.process_group = process_group
        self._heads = AttachedHeads(student_temp, fused=fused)

    @property
    def fused(self) -> bool:
        """Whether the attached heads return features instead of logits and scores."""
        return self._heads.fused

    def attach(self, student: nn.Module, teacher: nn.Module, head: str | None = None) -> None:
        """Find the head in `student` and in `teacher` and take over the temperatures; see `TeacherTargets.attach`."""
        self._heads.take(self._heads.find(student, teacher, head))

    def forward(self, student_patch_logits: Tensor, teacher_patch_probs: Tensor) -> Tensor:
        """The mean over masked patches: logits and probabilities (M, K); with fused=True features (M, p)."""
        self._heads.get()
        if student_patch_logits.shape != teacher_patch_probs.shape:
            raise ValueError(
                f"`student_patch_logits` (of shape {tuple(student_patch_logits.shape)}) must have the shape of "
                f"`teacher_patch_probs` (={tuple(teacher_patch_probs.shape)})"
            )
        check_not_empty("student_patch_logits", student_patch_logits)
        if self.fused:
            return self._fused(student_patch_logits, teacher_patch_probs)
        log_probabilities = torch.log_softmax(at_least_float32(student_patch_logits) / self.student_temp, dim=-1)
        return -(at_least_float32(teacher_patch_probs) * log_probabilities).sum(dim=-1).mean()

    def _fused(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Of features (M, p)."""
        if self._reading is None:
            raise RuntimeError(
                "call `sinkhorn_knopp_teacher` before the loss: it tells how the loss reads the teacher's features"
            )
        pair = self._heads.get()
        temperature, offset = self._reading
        with without_autocast(student.device) if pair.teacher.float32_scores else nullcontext():
            total, _, _ = prototype_cross_entropy(
                with_prototypes(student, pair.student.last_layer),
                with_prototypes(teacher, pair.teacher.last_layer),
                student_temperature=self.student_temp,
                teacher_temperature=temperature,
                normalizer=pair.teacher.normalizer,
                log_center=offset,
            )
        return total / len(student)

    @torch.no_grad()
    def sinkhorn_knopp_teacher(
        self,
        teacher_patch_tokens: Tensor,
        teacher_temp: float,
        num_samples: int | Tensor | None = None,
        n_iterations: int = 3,
    ) -> Any:
        """The teacher's assignments (M, K) by Sinkhorn-Knopp over all ranks; `num_samples` cancels.

        With fused=True the output, features (M, p), comes back as it is, to be read this way by the loss.
        """
        self._heads.check_outputs(teacher_patch_tokens)
        temperature = positive("teacher_temp", teacher_temp)
        if not self.fused:
            return sinkhorn_knopp(teacher_patch_tokens, n_iterations, self.process_group, temperature=temperature)
        head = self._heads.get().teacher
        offset = prototype_offsets_of_features(
            with_prototypes(teacher_patch_tokens, head.last_layer),
            n_iterations,
            self.process_group,
            temperature=temperature,
            exact=head.float32_scores,
        )
        # The assignments lack log C_p, which the fused cross-entropy adds.
        self._reading = (temperature, offset + head.log_normalizer(temperature, head.last_layer.gathered_norms()))
        return teacher_patch_tokens

    def __getstate__(self) -> dict[str, Any]:
        heads = AttachedHeads(self.student_temp, fused=self.fused)
        return super().__getstate__() | {"_heads": heads, "_reading": None}  # a copy is not attached
