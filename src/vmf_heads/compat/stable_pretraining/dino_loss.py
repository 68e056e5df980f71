"""stable-pretraining's loss on [CLS] tokens for heads with log C_p in their logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..._attached import AttachedHeads
from ..._checks import positive
from ..._matmul import without_autocast
from ...cross_entropy import dino_pairs
from ...teacher import TeacherTargets
from .._attached import check_not_empty
from .._late_center import LateCenterLoss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["DINOv1Loss"]


class DINOv1Loss(LateCenterLoss):
    """stable-pretraining's DINO loss for vMF heads: the mean cross-entropy over pairs of different views.

    Equals, for student logits s (S, B, K) at temperature_student and teacher probabilities t (T, B, K)::

        pairs = [(i, j) for i in range(S) for j in range(T) if i != j]
        sum(-(t[j] * log_softmax(s[i] / temperature_student, dim=1)).sum(dim=1).mean() for i, j in pairs) / len(pairs)

    With heads of prototype norm 1 and centering="logit" (or under Sinkhorn-Knopp) it is stable-pretraining's own loss.

    Args:
        temperature_student: the student's temperature.
        center_momentum: momentum of the centre.
        centering: "probability" is Eq. 9; "logit" is DINO's Eq. 8 on logits with log C_p.
        center_on: see `ProbabilityCentering`; for centering="probability" only.
        center_start: "first_batch" as in stable-pretraining: the first update sets the centre; or "zeros".
        process_group: the ranks that share one centre; None means all of them.
        fused: compute loss and gradients from features with `prototype_cross_entropy`, without any logits. Same numbers
            to rounding, a fraction of the memory; attached heads then return features.

    `attach(student, teacher)` must be called once, before a state dict is loaded: it tells the number of prototypes.
    State dict: `log_center` (K,) with probability centring, `center` (1, K) with logit centring. One without either, as
    stable-pretraining's are, loads, and the centre starts anew.

    Raises:
        ValueError, TypeError: an argument is out of its range or a tensor has the wrong shape.
        RuntimeError: called before `attach`.

    Reference: Govindarajan et al., ICLR 2023, Eq. 6, 7, 8 and 9; Caron et al., ICCV 2021.

    >>> import torch
    >>> from vmf_heads.compat.stable_pretraining import DINOProjector, DINOv1Loss
    >>> student, teacher = (DINOProjector(16, 16, 8, 32) for _ in range(2))
    >>> loss = DINOv1Loss()
    >>> loss.attach(student, teacher)
    >>> views = torch.randn(4, 5, 16)
    >>> scores = teacher(views[:2])
    >>> targets = loss.softmax_center_teacher(scores, teacher_temp=0.04)
    >>> value = loss(student(views), targets)
    >>> loss.update_center(scores)
    >>> value.shape
    torch.Size([])
    """

    def __init__(
        self,
        temperature_student: float = 0.1,
        center_momentum: float = 0.9,
        *,
        centering: str = "probability",
        center_on: str = "responsibilities",
        center_start: str = "first_batch",
        process_group: ProcessGroup | None = None,
        fused: bool = False,
    ) -> None:
        positive("temperature_student", temperature_student)
        # The number of prototypes is not known before `attach`.
        super().__init__(
            1,
            temperature_student,
            center_momentum,
            (1, 1),
            centering,
            center_on,
            center_start,
            process_group,
            fused=fused,
        )
        self._options: dict[str, Any] = {
            "centering": centering,
            "center_on": center_on,
            "center_start": center_start,
            "process_group": process_group,
            "fused": fused,
        }

    @property
    def temperature_student(self) -> float:
        """The student's temperature."""
        return self.student_temp

    def attach(self, student: nn.Module, teacher: nn.Module, head: str | None = None) -> None:
        """Find the head in `student` and in `teacher`, make a centre of its size, and take over the temperatures; see
        `TeacherTargets.attach`."""
        found = AttachedHeads(self.student_temp, fused=self.fused).find(student, teacher, head)
        if self.num_prototypes != found.student.num_prototypes:
            self.num_prototypes = found.student.num_prototypes
            self.teacher = TeacherTargets(
                self.num_prototypes, self.student_temp, self.center_momentum, **self._options
            ).to(found.student.last_layer.norms.device)
        self.teacher.attach(student, teacher, head)

    def forward(self, student_logits: Tensor, teacher_probs: Tensor) -> Tensor:
        """The mean over pairs of different views: logits (S, B, K) of the student, probabilities (T, B, K).

        With fused=True both are features (S, B, p) and (T, B, p).
        """
        if student_logits.dim() != 3 or teacher_probs.dim() != 3 or student_logits.shape[1:] != teacher_probs.shape[1:]:
            raise ValueError(
                f"`student_logits` (of shape {tuple(student_logits.shape)}) and `teacher_probs` (of shape "
                f"{tuple(teacher_probs.shape)}) must be (S, B, K) and (T, B, K)"
            )
        if len(student_logits) * len(teacher_probs) < 2:
            raise ValueError("`student_logits` and `teacher_probs` must hold two different views: here both hold one")
        check_not_empty("student_logits", student_logits)
        if self.fused:
            return self._fused(student_logits, teacher_probs)
        log_probabilities = self._log_student("student_logits", student_logits)
        with without_autocast(student_logits.device):
            cross_entropy = -torch.einsum("sbk,tbk->st", log_probabilities, teacher_probs.to(log_probabilities.dtype))
        other_view = ~torch.eye(*cross_entropy.shape, dtype=torch.bool, device=cross_entropy.device)
        return cross_entropy.mul(other_view).sum() / (_pairs(*cross_entropy.shape) * student_logits.shape[1])

    def _fused(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Of features (S, B, p) and (T, B, p)."""
        self._attached()
        self._check_columns("student_logits", student)
        s, t, images = len(student), len(teacher), student.shape[1]
        rows, _ = dino_pairs(images, max(s, t), ngcrops=t, device=student.device)
        rows = rows[: s * images]
        weights = rows.new_full(rows.shape, 1 / (_pairs(s, t) * images), dtype=torch.float64)
        return self._cross_entropy_fused([student], [teacher], weights, rows)

    @torch.no_grad()
    def sinkhorn_knopp_teacher(
        self,
        teacher_logits: Tensor,
        teacher_temp: float,
        num_samples: int | Tensor | None = None,
        n_iterations: int = 3,
    ) -> Any:
        """The teacher's assignments (..., K) by Sinkhorn-Knopp over all ranks, for logits of any size.

        With fused=True the output, features (..., p), comes back as it is, to be read this way by the loss.
        `num_samples` cancels and is left as it is.
        """
        return self._sinkhorn_knopp(teacher_logits, teacher_temp, n_iterations)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        names = self.STATE_NAMES.values()
        if not any(prefix + name in state_dict for name in names):  # stable-pretraining saves none
            state_dict |= self.state_dict(prefix=prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _pairs(student_views: int, teacher_views: int) -> int:
    """The number of pairs of two different views."""
    return student_views * teacher_views - min(student_views, teacher_views)
