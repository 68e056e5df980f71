"""stable-pretraining with vMF prototypes: its projector and its losses, with the originals' names and signatures.

Experimental where the method is DINOv2 or DINOv3. The change to stable_pretraining/methods/dino.py::

    -from stable_pretraining.losses import DINOv1Loss
    +from vmf_heads.compat.stable_pretraining import DINOProjector, DINOv1Loss

    -            _build_dino_projector(
    +            DINOProjector(

    +        self.dino_loss.attach(self.projector.student, self.projector.teacher)    # at the end of `__init__`

Its prototypes are a plain linear layer, so their norms are free from the start. Its centre starts from the first batch
instead of zero, and is not in its state dict; here it is in the loss's.

With `fused=True` the projectors return features and no logits exist. What stands for targets are then the teacher's
features, which the loss reads as the last `softmax_center_teacher` or `sinkhorn_knopp_teacher` says; the methods, which
view, join and select rows of them, stay as they are.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._attached import AttachedHeads
from .._checks import at_least, positive
from .._matmul import at_least_float32, without_autocast
from ..cross_entropy import dino_pairs, prototype_cross_entropy
from ..head import PrototypeHead
from ..prototypes import LinearPrototypes
from ..teacher import TeacherTargets, with_prototypes
from ._attached import check_not_empty
from ._late_center import LateCenterLoss
from ._sinkhorn import prototype_offsets_of_features, sinkhorn_knopp

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["DINOProjector", "DINOv1Loss", "DINOv2Loss", "iBOTPatchLoss"]

# Where stable-pretraining's projector, an nn.Sequential, has the parameters of this one.
_ORIGINAL = {f"{i}.{kind}": f"mlp.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")}
_ORIGINAL["6.weight"] = "last_layer.weight"


class DINOProjector(PrototypeHead):
    """stable-pretraining's projector of DINO, iBOT and DINOv2 with log C_p of each prototype in its logits.

    In place of `_build_dino_projector` and `_ibot_head`. Initialised as there, by torch's defaults: the norms start
    from 0.58 and kappa from 5.8 at temperature 0.1. Parameters are `mlp.0`, `mlp.2`, `mlp.4` and `last_layer.weight`
    (K, p); a state dict with the original's `0`, `2`, `4` and `6.weight` loads.

    Args:
        in_dim: dimension of the backbone's features.
        hidden_dim: width of the hidden layers.
        bottleneck_dim: dimension p of the sphere's space, >= 2.
        n_prototypes: number of prototypes K.
        temperature: as in `VMFPrototypeHead`; the `attach` of the losses sets it.
        normalizer: as in `VMFPrototypeHead`.

    Shape: (..., in_dim) to (..., K), in float32.

    Raises:
        ValueError, TypeError: an argument is out of its range.

    >>> import torch
    >>> from vmf_heads.compat.stable_pretraining import DINOProjector
    >>> DINOProjector(32, 16, 8, 100)(torch.randn(4, 32)).shape
    torch.Size([4, 100])
    """

    def __init__(
        self,
        in_dim: int,
        hidden_dim: int,
        bottleneck_dim: int,
        n_prototypes: int,
        *,
        temperature: float = 0.1,
        normalizer: str = "vmf",
    ) -> None:
        at_least("in_dim", in_dim, 1)
        at_least("hidden_dim", hidden_dim, 1)
        mlp = nn.Sequential(
            nn.Linear(in_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, at_least("bottleneck_dim", bottleneck_dim, 2)),
        )
        prototypes = LinearPrototypes(bottleneck_dim, at_least("n_prototypes", n_prototypes, 1))
        super().__init__(in_dim, mlp, prototypes, temperature=temperature, normalizer=normalizer)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for original, name in _ORIGINAL.items():
            if prefix + original in state_dict:
                state_dict[prefix + name] = state_dict.pop(prefix + original)
        super()._load_from_state_dict(state_dict, prefix, *args)


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


def _pairs(student_views: int, teacher_views: int) -> int:
    """The number of pairs of two different views."""
    return student_views * teacher_views - min(student_views, teacher_views)
