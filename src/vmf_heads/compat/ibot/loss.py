"""The loss of iBOT-vMF: the [CLS] objective and the masked patches' objective."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..._checks import at_least
from ..._matmul import at_least_float32
from ...centering import Centering, check_momentum
from ...cross_entropy import dino_pairs
from ...teacher import TargetSummary, TeacherSide, TeacherTargets, features_of, with_prototypes
from .._attached import AttachedLoss, check_not_empty
from .._temperature import temperature_at, temperature_schedule
from .tokens import Output, Tokens, check_shapes

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class iBOTLoss(AttachedLoss):
    """The loss of iBOT-vMF: the [CLS] objective over pairs of crops and the masked patches' objective, each with its
    own teacher temperature and centre (appendix A.5).

    Equals, for probabilities P (Eq. 6 of the student, Eq. 7 of the teacher) of [CLS] tokens and of patches::

        cls = mean over q != v of (-P_t[q] * log(P_s[v])).sum(dim=-1).mean()
        of_patch = (-P_t_patch[v] * log(P_s_patch[v])).sum(dim=-1)  # (B, N), same position, same view
        patch = mean over v of ((of_patch * mask[v]).sum(dim=1) / mask[v].sum(dim=1).clamp(min=1)).mean()
        {"cls": lambda1 * cls, "patch": lambda2 * patch, "loss": lambda1 * cls + lambda2 * patch}

    (L_MIM is printed without its logarithm in A.5; a cross-entropy has it, and so has iBOT's code.) One update of both
    centres follows, the patches' from *all* patch tokens of the teacher, masked or not. With heads of prototype norm 1
    and centering="logit" it is iBOT's own loss.

    Args:
        out_dim: number of prototypes K of [CLS] tokens.
        patch_out_dim: number of prototypes K2 of patch tokens; K if a head is shared.
        ngcrops: global crops per image.
        nlcrops: local crops per image.
        warmup_teacher_temp: the teacher's temperature for [CLS] at the start.
        teacher_temp: the teacher's temperature for [CLS] after its warm-up.
        warmup_teacher_temp2: the teacher's temperature for patches at the start.
        teacher_temp2: the teacher's temperature for patches after its warm-up.
        warmup_teacher_temp_epochs: how many epochs a temperature rises linearly; that of patches begins to rise at
            `mim_start_epoch`.
        nepochs: the number of epochs of the training.
        student_temp: the student's temperature, for both.
        center_momentum: momentum of the centre for [CLS].
        center_momentum2: momentum of the centre for patches.
        lambda1: weight of the [CLS] objective.
        lambda2: weight of the patch objective.
        mim_start_epoch: the epoch at which masking begins.
        centering: "probability" is Eq. 9; "logit" is iBOT's own (Eq. 8), on logits with log C_p.
        center_on: see `ProbabilityCentering`; for centering="probability" only.
        center_start: "zeros", or "first_batch": the first update sets the centre.
        fused: compute losses and gradients from features with `prototype_cross_entropy`, without the logits of any
            token. Same numbers to rounding, a fraction of the memory; attached heads then return features.
        process_group: the ranks that share the centres; None means all of them.

    `attach(student, teacher)` must be called once, after the models are built and wrapped: the loss owns all
    temperatures. State dict: `log_center` (K,) and `log_center2` (K2,) with probability centring; `center` (1, K) and
    `center2` (1, 1, K2), as in iBOT, with logit centring. The centres of an iBOT checkpoint load into either.

    Raises:
        ValueError, TypeError: an argument is out of its range or an output has the wrong shape.
        RuntimeError: called before `attach`.

    Reference: Govindarajan et al., ICLR 2023, Eq. 6, 7, 9 and appendix A.5; Zhou et al., ICLR 2022.

    >>> import torch
    >>> from vmf_heads.compat.ibot import iBOTHead, iBOTLoss
    >>> student, teacher = (iBOTHead(16, 32, patch_out_dim=32, hidden_dim=16, bottleneck_dim=8) for _ in range(2))
    >>> loss = iBOTLoss(32, 32, 2, 0, 0.04, 0.04, 0.04, 0.07, warmup_teacher_temp_epochs=3, nepochs=10)
    >>> loss.attach(student, teacher)
    >>> tokens = torch.randn(2 * 5, 1 + 9, 16)  # 2 crops of 5 images, crop by crop: [CLS] and 3 x 3 patches
    >>> masks = [torch.rand(5, 3, 3) < 0.3 for _ in range(2)]
    >>> losses = loss(student(tokens), teacher(tokens), None, masks, epoch=0)
    >>> sorted(losses)
    ['cls', 'loss', 'patch']
    """

    STATE_NAMES: ClassVar[dict[str, str]] = AttachedLoss.STATE_NAMES | {
        inside.replace(".", "2."): f"{outside}2" for inside, outside in AttachedLoss.STATE_NAMES.items()
    }

    def __init__(
        self,
        out_dim: int,
        patch_out_dim: int,
        ngcrops: int,
        nlcrops: int,
        warmup_teacher_temp: float,
        teacher_temp: float,
        warmup_teacher_temp2: float,
        teacher_temp2: float,
        warmup_teacher_temp_epochs: int,
        nepochs: int,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        center_momentum2: float = 0.9,
        lambda1: float = 1.0,
        lambda2: float = 1.0,
        mim_start_epoch: int = 0,
        *,
        centering: str = "probability",
        center_on: str = "responsibilities",
        center_start: str = "zeros",
        fused: bool = False,
        process_group: ProcessGroup | None = None,
    ) -> None:
        at_least("out_dim", out_dim, 1)
        at_least("patch_out_dim", patch_out_dim, 1)
        options: dict[str, Any] = {
            "centering": centering,
            "center_on": center_on,
            "center_start": center_start,
            "fused": fused,
            "process_group": process_group,
        }
        super().__init__(TeacherTargets(out_dim, student_temp, center_momentum, **options))
        self.teacher2 = TeacherTargets(
            patch_out_dim,
            student_temp,
            check_momentum("center_momentum2", center_momentum2),
            center_shape=(1, 1, patch_out_dim),
            layer="last_layer2",
            **options,
        )
        self.ngcrops = at_least("ngcrops", ngcrops, 1)
        self.nlcrops = at_least("nlcrops", nlcrops, 0)
        self.ncrops = ngcrops + nlcrops
        if self.ncrops < 2:
            raise ValueError(f"`ngcrops` + `nlcrops` (={self.ncrops}) must be >= 2: the [CLS] objective compares crops")
        self.out_dim, self.patch_out_dim = out_dim, patch_out_dim
        self.center_momentum, self.center_momentum2 = center_momentum, center_momentum2
        self.lambda1, self.lambda2 = lambda1, lambda2
        self.teacher_temp_schedule = temperature_schedule(
            warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs, nepochs
        )
        self.teacher_temp2_schedule = temperature_schedule(
            warmup_teacher_temp2,
            teacher_temp2,
            warmup_teacher_temp_epochs,
            nepochs,
            start_epoch=mim_start_epoch,
            suffix="2",
        )

    @property
    def centering2(self) -> Centering:
        """The centre for patches."""
        return self.teacher2.centering

    @property
    def center2(self) -> Any:
        """The buffer of the original loss for patches, with logit centring only."""
        return self.centering2.center

    def forward(
        self,
        student_output: tuple[Output, Output],
        teacher_output: tuple[Output, Output],
        student_local_cls: Output | None,
        student_mask: Sequence[Tensor],
        epoch: int,
        *,
        commit: bool = True,
    ) -> dict[str, Tensor]:
        """The losses of what the attached heads returned, then one update of both centres.

        `student_output` and `teacher_output`: [CLS] (ngcrops * B, K) and patches (ngcrops * B, N, K2) of the global
        crops, crop by crop. `student_local_cls`: (nlcrops * B, K) or None without local crops. With fused=True all of
        them are features (..., p). `student_mask`: for each global crop (at least) the masked patches (B, H, W) with
        H * W = N, bool. When gradients are accumulated over micro-batches, commit=False on all but the last makes one
        update of the centres from all of them.
        """
        student, teacher = Tokens(*student_output).with_local(student_local_cls), Tokens(*teacher_output)
        columns = ("out_dim", self.out_dim), ("patch_out_dim", self.patch_out_dim)
        if self.fused:
            columns = (("bottleneck_dim", self._attached()[1].bottleneck_dim),) * 2
        check_not_empty("teacher_output[0]", teacher.cls)
        check_shapes(student, teacher, student_mask, self.ngcrops, self.ncrops, columns)
        self.teacher.check_outputs(teacher.cls, student.cls)
        self.teacher2.check_outputs(teacher.patch, student.patch)
        mask = torch.cat([view.flatten(1) for view in student_mask[: self.ngcrops]]).double()  # (ngcrops * B, N)
        # The mean over the masked patches of a view of an image, then over views and images.
        weights = mask / (mask.sum(dim=1, keepdim=True).clamp(min=1) * len(mask))

        losses = self._fused_losses if self.fused else self._losses
        cls, patch = losses(student, teacher, weights, epoch)
        if commit:
            self._commit()
        loss_cls, loss_patch = self.lambda1 * cls, self.lambda2 * patch
        return {"cls": loss_cls, "patch": loss_patch, "loss": loss_cls + loss_patch}

    def attach(self, student: nn.Module, teacher: nn.Module, head: str | None = None) -> None:
        """Find the `iBOTHead` in `student` and in `teacher` and take over their temperatures; see
        `TeacherTargets.attach`."""
        # Both are found and checked before either is changed.
        pairs = [side.find_heads(student, teacher, head) for side in (self.teacher, self.teacher2)]
        for side, pair in zip((self.teacher, self.teacher2), pairs, strict=True):
            side.take_heads(pair)

    @torch.no_grad()
    def targets(self, teacher_output: tuple[Output, Output], epoch: int) -> tuple[Tensor, Tensor]:
        """The teacher's probabilities of [CLS] (..., K) and patch tokens (..., K2), Eq. 7; the centres stay as they
        are."""
        teacher, cls, patch = self._read(Tokens(*teacher_output), epoch)
        return cls.targets(teacher.cls), patch.targets(teacher.patch)

    @torch.no_grad()
    def target_summary(self, teacher_output: tuple[Output, Output], epoch: int) -> tuple[TargetSummary, TargetSummary]:
        """Entropies and use of what `targets` returns, of [CLS] and patches; the centres stay as they are."""
        teacher, cls, patch = self._read(Tokens(*teacher_output), epoch)
        return cls.summary(teacher.cls), patch.summary(teacher.patch)

    @torch.no_grad()
    def update_center(self, teacher_cls: Output, teacher_patch: Output, epoch: int, *, commit: bool = True) -> None:
        """One step of both centres from this batch, over all ranks; `forward` calls it.

        commit=False only adds the batch to those that the next step will average.
        """
        teacher, *sides = self._read(Tokens(teacher_cls, teacher_patch), epoch)
        for output, side in zip(teacher, sides, strict=True):
            side.accumulate_(output)
        if commit:
            self._commit()

    @torch.no_grad()
    def student_logits(self, student_cls: Output) -> Tensor:
        """The logits (..., K) of [CLS] tokens that the student's head returns without `fused`, from what it returns
        with it: for statistics such as `acc` of main_ibot.py."""
        head = self._attached()[0]
        if not self.fused:
            return features_of(student_cls)
        output = with_prototypes(student_cls, head.last_layer)
        scores = output.scores(exact=head.float32_scores)
        return scores + self.student_temp * head.log_normalizer(self.student_temp, output.norms)

    @torch.no_grad()
    def teacher_scores(self, teacher_cls: Output) -> Tensor:
        """The same of the teacher: its raw scores (..., K)."""
        if not self.fused:
            return features_of(teacher_cls)
        head = self._attached()[1]
        return with_prototypes(teacher_cls, head.last_layer).scores(exact=head.float32_scores)

    def with_cls_logits(
        self, student_output: tuple[Output, Output], teacher_output: tuple[Output, Output]
    ) -> tuple[tuple[Tensor, Output], tuple[Tensor, Output]]:
        """Both outputs with `student_logits` and `teacher_scores` in place of their [CLS] tokens; patches stay as they
        are."""
        (student_cls, student_patch), (teacher_cls, teacher_patch) = student_output, teacher_output
        return (self.student_logits(student_cls), student_patch), (self.teacher_scores(teacher_cls), teacher_patch)

    def _losses(self, student: Tokens, teacher: Tokens, weights: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """Both losses from logits and scores, which join what the next step of the centres averages."""
        teacher, cls, patch = self._read(teacher, epoch)
        log_p = self._log_probabilities(student.cls).chunk(self.ncrops)
        total_cls = log_p[0].new_zeros(())
        for q, target in enumerate(cls.targets(teacher.cls).chunk(self.ngcrops)):
            for v in range(self.ncrops):
                if v != q:  # the same view of the same image teaches nothing
                    total_cls = total_cls - (target * log_p[v]).sum(dim=-1).mean()

        total_patch = torch.zeros_like(total_cls)
        views = zip(*(x.chunk(self.ngcrops) for x in (student.patch, teacher.patch, weights)), strict=True)
        for logits, scores, weight in views:
            of_patch = -(patch.targets(scores) * self._log_probabilities(logits)).sum(dim=-1)  # (B, N)
            total_patch = total_patch + (of_patch * weight.to(of_patch.dtype)).sum()

        cls.accumulate_(teacher.cls)
        patch.accumulate_(teacher.patch)
        return total_cls / (self.ngcrops * (self.ncrops - 1)), total_patch

    def _fused_losses(self, student: Tokens, teacher: Tokens, weights: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """The same from features. Only masked patches of the student take part, all of the teacher's are centred."""
        student = student.with_prototypes(self._attached()[0])
        teacher, cls, patch = self._read(teacher, epoch)
        images = len(teacher.cls.features) // self.ngcrops
        pairs, pair_weights = dino_pairs(images, self.ncrops, ngcrops=self.ngcrops, device=weights.device)
        loss_cls = cls.cross_entropy(
            student.cls, teacher.cls, self.student_temp, teacher_rows=pairs, weights=pair_weights
        )

        weights = weights.flatten()
        masked, visible = (rows.nonzero().squeeze(1) for rows in (weights > 0, weights == 0))
        loss_patch = patch.cross_entropy(
            student.patches(masked),
            teacher.patches(masked),
            self.student_temp,
            teacher_rows=None,
            weights=weights[masked, None],
        )
        patch.accumulate_(teacher.patches(visible))
        return loss_cls, loss_patch

    def _log_probabilities(self, logits: Tensor) -> Tensor:
        return (at_least_float32(logits) / self.student_temp).log_softmax(dim=-1)

    @torch.no_grad()
    def _read(self, tokens: Tokens, epoch: int) -> tuple[Tokens, TeacherSide, TeacherSide]:
        """The teacher's outputs, with their prototypes if `fused`, and how those of [CLS] and of patches are read."""
        if self.fused:
            tokens = tokens.with_prototypes(self._attached()[1])
        # The same prototypes have another kappa at each temperature, so a shared head has two normalisers, too.
        return (
            tokens,
            self.teacher.at(temperature_at(self.teacher_temp_schedule, epoch)),
            self.teacher2.at(temperature_at(self.teacher_temp2_schedule, epoch)),
        )

    def _commit(self) -> None:
        self.teacher.commit_()
        self.teacher2.commit_()
