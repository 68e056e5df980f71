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

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._checks import at_least, one_of, positive
from .._matmul import at_least_float32, without_autocast
from ..centering import ProbabilityCentering
from ..cross_entropy import dino_pairs, prototype_cross_entropy
from ..head import HeadOutput, VMFPrototypeHead
from ._attach import attach_heads, find_head, fused_output, warn_if_norms_are_frozen
from ._teacher import (
    CENTERING,
    LogitSum,
    offset_at,
    rename_keys_,
    temperature_at,
    temperature_schedule,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["DINOHead", "DINOLoss"]

# The library's head has the constructor and the parameter names of DINO's; only norm_last_layer defaults to False.
DINOHead = VMFPrototypeHead

# Where the centring's buffers stand in the loss, and their names in its state dict.
_STATE_NAMES = {"centering.log_center": "log_center", "centering.logit_center": "logit_center"}
_LOADED_NAMES = {new: old for old, new in _STATE_NAMES.items()} | {"center": "centering.center"}


class DINOLoss(nn.Module):
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
        warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs, nepochs: the teacher's temperature rises linearly
            from the first to the second over so many epochs, then stays.
        student_temp: the student's temperature.
        center_momentum: momentum of the centre.
        centering: "probability" is Eq. 9; "logit" is DINO's Eq. 8 on logits with log C_p, for the ablation of Table 1.
        center_on: see `ProbabilityCentering`; for centering="probability" only.
        fused: compute loss and gradients from features with `prototype_cross_entropy`, without the (N, K) logits. Same
            numbers to rounding, a fraction of the memory; attached heads then return features.
        process_group: the ranks that share one centre; None means all of them.

    `attach(student, teacher)` must be called once, after the models are built and wrapped: the loss owns both
    temperatures. State dict: `log_center` (K,) with probability centring; `center` (1, K), as in DINO, with logit
    centring. A DINO checkpoint's `center` loads into either.

    Raises:
        ValueError, TypeError: an argument is out of its range or an output has the wrong shape.
        RuntimeError: called before `attach`, or the teacher's head has not run.

    Source: Govindarajan et al., ICLR 2023, Eq. 6, 7, 8 and 9; Caron et al., ICCV 2021.

    >>> import torch
    >>> from vmf_heads.compat.dino import DINOHead, DINOLoss
    >>> student, teacher = (DINOHead(16, 32, hidden_dim=16, bottleneck_dim=8) for _ in range(2))
    >>> loss = DINOLoss(32, 4, 0.04, 0.07, warmup_teacher_temp_epochs=3, nepochs=10)
    >>> loss.attach(student, teacher)
    >>> crops = torch.randn(4 * 5, 16)  # 4 crops of 5 images, crop by crop; the teacher sees the first two
    >>> loss(student(crops), teacher(crops[: 2 * 5]), epoch=0).shape
    torch.Size([])
    """

    center: Tensor

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
        center_on: str = "scores",
        fused: bool = False,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= center_momentum <= 1:
            raise ValueError(f"`center_momentum` (={center_momentum}) must be in [0, 1]")
        self.num_prototypes = at_least("out_dim", out_dim, 1)
        self.ncrops = at_least("ncrops", ncrops, 2)
        self.student_temp = positive("student_temp", student_temp)
        self.center_momentum = center_momentum
        self.fused = fused
        self.process_group = process_group
        self.teacher_temp_schedule = temperature_schedule(
            warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs, nepochs
        )
        self.centering: ProbabilityCentering | None = None
        if one_of("centering", centering, CENTERING) == "probability":
            self.centering = ProbabilityCentering(
                out_dim, center_momentum, center_on=center_on, process_group=process_group
            )
        else:
            self.register_buffer("center", torch.zeros(1, at_least("out_dim", out_dim, 1)))
        self._logit_sum = LogitSum()
        # In a tuple, so that the heads do not become submodules and are not saved with the loss.
        self._heads: tuple[VMFPrototypeHead, VMFPrototypeHead] | None = None

    def attach(self, student: nn.Module, teacher: nn.Module) -> None:
        """Find the head in `student` and in `teacher` (through DDP, FSDP or compile) and take over their temperatures.

        From now on the student's head returns logits at `student_temp`, the teacher's raw scores. With fused=True both
        return features, or a `HeadOutput` under FSDP2 and DDP(find_unused_parameters=True). Calling it again with the
        same models does nothing.

        Raises ValueError unless each holds exactly one head and both are of a kind with `out_dim` prototypes,
        RuntimeError if a head already serves another loss in another way; warns if the student's norms are frozen.
        """
        student_head, teacher_head = find_head(student, "student"), find_head(teacher, "teacher")
        outputs = ("logits", "scores")
        if self.fused:
            outputs = (fused_output(student, student_head), fused_output(teacher, teacher_head))
        attach_heads(
            student_head,
            teacher_head,
            outputs=outputs,
            num_prototypes=self.num_prototypes,
            student_temp=self.student_temp,
        )
        warn_if_norms_are_frozen(student_head)
        self._heads = (student_head, teacher_head)

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
        student_rows, teacher_rows = len(_rows(student_output)), len(_rows(teacher_output))
        if teacher_rows % 2 or student_rows * 2 != teacher_rows * self.ncrops:
            raise ValueError(
                f"`student_output` (of {student_rows} rows) must have `ncrops` (={self.ncrops}) rows per image and "
                f"`teacher_output` (of {teacher_rows} rows) 2, crop by crop"
            )
        if self.fused:
            return self._fused_forward(student_output, teacher_output, epoch, commit)
        student_temp = self._attached()[0].temperature
        if student_temp != self.student_temp:
            raise RuntimeError(
                f"`temperature` of the student's head (={student_temp}) must stay the loss's `student_temp` "
                f"(={self.student_temp}) after `attach`: the loss divides by it"
            )
        targets = self.targets(teacher_output, epoch).chunk(2)
        logits = at_least_float32(_rows(student_output)) / self.student_temp
        total = logits.new_zeros(())
        for v, log_probabilities in enumerate(crop.log_softmax(dim=1) for crop in logits.chunk(self.ncrops)):
            for u, target in enumerate(targets):
                if u != v:  # the same view of the same image teaches nothing
                    total = total - (target * log_probabilities).sum(dim=1).mean()
        self.update_center(teacher_output, epoch, commit=commit)
        return total / (2 * self.ncrops - 2)

    @torch.no_grad()
    def targets(self, teacher_output: Tensor | HeadOutput, epoch: int) -> Tensor:
        """The teacher's probabilities P_t (N, K) for any N rows of its output, Eq. 7; the centre stays as it is."""
        temperature, bias = self._teacher(teacher_output, epoch)
        return torch.softmax(self._scores(teacher_output) / temperature + bias - self._log_center(temperature), dim=1)

    @torch.no_grad()
    def update_center(self, teacher_output: Tensor | HeadOutput, epoch: int, *, commit: bool = True) -> None:
        """One step of Eq. 9 ("probability") or Eq. 8 ("logit") from this batch, over all ranks; `forward` calls it.

        commit=False only adds the batch to those that the next step will average.
        """
        temperature, bias = self._teacher(teacher_output, epoch)
        scores = self._scores(teacher_output)
        if self.centering is not None:
            self.centering.convert_logit_center_(temperature)
            self.centering.accumulate_(*self.centering.log_sum(scores, temperature, log_normalizer=bias))
        else:
            self._logit_sum.accumulate_(scores.sum(dim=0) + len(scores) * temperature * bias, len(scores))
        if commit:
            self._commit()

    def _fused_forward(
        self, student_output: Tensor | HeadOutput, teacher_output: Tensor | HeadOutput, epoch: int, commit: bool
    ) -> Tensor:
        student_head, teacher_head = self._attached()
        student = _head_output(student_output, student_head)
        with torch.no_grad():
            teacher = _head_output(teacher_output, teacher_head)
        temperature, bias = self._teacher(teacher_output, epoch)
        targets, weights = dino_pairs(len(teacher.features) // 2, self.ncrops, device=student.features.device)
        device = student.features.device
        with nullcontext() if student_head.logits_dtype is None else without_autocast(device):
            loss, log_sum, rows = prototype_cross_entropy(
                student.features,
                student.prototypes,
                teacher.features,
                teacher.prototypes,
                student_temperature=self.student_temp,
                teacher_temperature=temperature,
                student_log_normalizer=student_head.log_normalizer(self.student_temp, student.norms),
                teacher_log_normalizer=bias,
                log_center=self._log_center(temperature),
                targets=targets,
                weights=weights,
                center_on="scores" if self.centering is None else self.centering.center_on,
            )
        if self.centering is not None:
            self.centering.accumulate_(log_sum, rows)
        else:  # Eq. 8 averages logits, which are linear in the features
            feature_sum = at_least_float32(teacher.features.detach()).sum(dim=0)
            score_sum = teacher.prototypes.detach() @ feature_sum
            self._logit_sum.accumulate_(score_sum + rows * temperature * bias, rows)
        if commit:
            self._commit()
        return loss

    def _commit(self) -> None:
        if self.centering is not None:
            self.centering.commit_()
        else:
            self._logit_sum.commit_(self.center, self.center_momentum, self.process_group)

    def _log_center(self, temperature: float) -> Tensor:
        return offset_at(self.centering, None if self.centering is not None else self.center, temperature)

    def _scores(self, teacher_output: Tensor | HeadOutput) -> Tensor:
        """<w, y> (N, K) of what the teacher's head returned."""
        if not self.fused:
            return at_least_float32(_rows(teacher_output))
        teacher = _head_output(teacher_output, self._attached()[1])
        return teacher.features @ teacher.prototypes.T

    def _teacher(self, teacher_output: Tensor | HeadOutput, epoch: int) -> tuple[float, Tensor]:
        """(temperature, log C_p of the teacher's prototypes (K,) up to a constant) for this output of the teacher."""
        head = self._attached()[1]
        columns = head.bottleneck_dim if self.fused else head.num_prototypes
        shape = _rows(teacher_output).shape
        if shape[1:] != (columns,):
            raise ValueError(f"`teacher_output` (of shape {tuple(shape)}) must be (N, {columns})")
        temperature = temperature_at(self.teacher_temp_schedule, epoch)
        norms = head.last_layer.norms if self.fused else head.last_prototype_norms
        if isinstance(teacher_output, HeadOutput):
            norms = teacher_output.norms
        if norms is None:
            raise RuntimeError("the attached teacher's head has not run: call the teacher before the loss")
        return temperature, head.log_normalizer(temperature, norms.detach())

    def _attached(self) -> tuple[VMFPrototypeHead, VMFPrototypeHead]:
        if self._heads is None:
            raise RuntimeError("call `attach(student, teacher)` once before the loss: it owns the heads' temperatures")
        return self._heads

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_heads": None}  # a copy is not attached and does not carry the models along

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The state of DINO's loss, with `log_center` in place of `center` where centring is in probability space."""
        state = super().state_dict(*args, prefix=prefix, **kwargs)
        rename_keys_(state, prefix, _STATE_NAMES)
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.centering is not None:
            rename_keys_(state_dict, prefix, _LOADED_NAMES)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _rows(output: Tensor | HeadOutput) -> Tensor:
    return output.features if isinstance(output, HeadOutput) else output


def _head_output(output: Tensor | HeadOutput, head: VMFPrototypeHead) -> HeadOutput:
    """`output` with the prototypes it belongs to, which are read from the head when they did not come along."""
    if isinstance(output, HeadOutput):
        return output
    return HeadOutput(output, head.last_layer.weight, head.last_layer.norms)
