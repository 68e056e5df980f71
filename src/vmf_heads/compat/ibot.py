"""iBOT-vMF inside bytedance/ibot: `iBOTHead` and `iBOTLoss` with the original's names and signatures.

The change to main_ibot.py, to be run with `--norm_last_layer false`::

    -from models.head import iBOTHead
    +from vmf_heads.compat.ibot import iBOTHead, iBOTLoss as VMFiBOTLoss

    -    ibot_loss = iBOTLoss(
    +    ibot_loss = VMFiBOTLoss(

    +    ibot_loss.attach(student, teacher)     # after both are built and wrapped

(The alias is needed because main_ibot.py defines its own class iBOTLoss further down, which would shadow the import.)
The accuracy `acc` that main_ibot.py logs compares the argmax of the teacher's raw scores with that of the student's
logits; in the original both are scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .._checks import at_least, one_of, positive
from .._matmul import at_least_float32
from ..centering import ProbabilityCentering
from ._attach import find_head, warn_if_norms_are_frozen
from ._ibot_head import iBOTHead
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

__all__ = ["iBOTHead", "iBOTLoss"]

# Where the centrings' buffers stand in the loss, and their names in its state dict.
_STATE_NAMES = {f"centering{n}.{name}": f"{name}{n}" for n in ("", "2") for name in ("log_center", "logit_center")}
_LOADED_NAMES = {new: old for old, new in _STATE_NAMES.items()} | {
    "center": "centering.center",
    "center2": "centering2.center",
}


class iBOTLoss(nn.Module):
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
        out_dim, patch_out_dim: number of prototypes K of [CLS] and K2 of patch tokens.
        ngcrops, nlcrops: global and local crops per image.
        warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs, nepochs: the teacher's temperature for [CLS]
            rises linearly from the first to the second over so many epochs, then stays.
        warmup_teacher_temp2, teacher_temp2: the same for patches; their warm-up begins at `mim_start_epoch`.
        student_temp: the student's temperature, for both.
        center_momentum, center_momentum2: momenta of the two centres.
        lambda1, lambda2: weights of the [CLS] and of the patch objective.
        mim_start_epoch: the epoch at which masking begins.
        centering: "probability" is Eq. 9; "logit" is iBOT's own (Eq. 8), on logits with log C_p.
        center_on: see `ProbabilityCentering`; for centering="probability" only.
        process_group: the ranks that share the centres; None means all of them.

    `attach(student, teacher)` must be called once, after the models are built and wrapped: the loss owns all
    temperatures. State dict: `log_center` (K,) and `log_center2` (K2,) with probability centring; `center` (1, K) and
    `center2` (1, 1, K2), as in iBOT, with logit centring. The centres of an iBOT checkpoint load into either.

    Raises:
        ValueError, TypeError: an argument is out of its range or an output has the wrong shape.
        RuntimeError: called before `attach`, or the teacher's head has not run.

    Source: Govindarajan et al., ICLR 2023, Eq. 6, 7, 9 and appendix A.5; Zhou et al., ICLR 2022.

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

    center: Tensor
    center2: Tensor

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
        center_on: str = "scores",
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.ngcrops = at_least("ngcrops", ngcrops, 1)
        self.nlcrops = at_least("nlcrops", nlcrops, 0)
        self.ncrops = ngcrops + nlcrops
        if self.ncrops < 2:
            raise ValueError(f"`ngcrops` + `nlcrops` (={self.ncrops}) must be >= 2: the [CLS] objective compares crops")
        self.out_dim = at_least("out_dim", out_dim, 1)
        self.patch_out_dim = at_least("patch_out_dim", patch_out_dim, 1)
        for name, momentum in (("center_momentum", center_momentum), ("center_momentum2", center_momentum2)):
            if not 0 <= momentum <= 1:
                raise ValueError(f"`{name}` (={momentum}) must be in [0, 1]")
        self.student_temp = positive("student_temp", student_temp)
        self.center_momentum, self.center_momentum2 = center_momentum, center_momentum2
        self.lambda1, self.lambda2 = lambda1, lambda2
        self.process_group = process_group
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
        self.centering: ProbabilityCentering | None = None
        self.centering2: ProbabilityCentering | None = None
        if one_of("centering", centering, CENTERING) == "probability":
            options: dict[str, Any] = {"center_on": center_on, "process_group": process_group}
            self.centering = ProbabilityCentering(out_dim, center_momentum, **options)
            self.centering2 = ProbabilityCentering(patch_out_dim, center_momentum2, **options)
        else:
            self.register_buffer("center", torch.zeros(1, out_dim))
            self.register_buffer("center2", torch.zeros(1, 1, patch_out_dim))
        self._logit_sum, self._logit_sum2 = LogitSum(), LogitSum()
        # In a tuple, so that the heads do not become submodules and are not saved with the loss.
        self._heads: tuple[iBOTHead, iBOTHead] | None = None

    def attach(self, student: nn.Module, teacher: nn.Module) -> None:
        """Find the head in `student` and in `teacher` (through DDP or compile) and take over their temperatures.

        From now on the student's head returns logits at `student_temp`, the teacher's raw scores. Calling it again with
        the same models does nothing.

        Raises ValueError unless each holds exactly one `iBOTHead`, both are of a kind and have the loss's numbers of
        prototypes, RuntimeError if a head already serves another loss in another way; warns if the student's
        prototype norms are frozen.
        """
        heads = _find_ibot_head(student, "student"), _find_ibot_head(teacher, "teacher")
        student_head, teacher_head = heads
        if student_head.normalizer != teacher_head.normalizer:
            raise ValueError(
                f"`normalizer` of the teacher's head (={teacher_head.normalizer!r}) must be that of the student's "
                f"(={student_head.normalizer!r})"
            )
        for name, head in zip(("student", "teacher"), heads, strict=True):
            found, wanted = (head.num_prototypes, head.num_patch_prototypes), (self.out_dim, self.patch_out_dim)
            if found != wanted:
                raise ValueError(
                    f"the {name}'s head has {found[0]} and {found[1]} prototypes; it must have `out_dim` "
                    f"(={wanted[0]}) for [CLS] and `patch_out_dim` (={wanted[1]}) for patches. A shared head has "
                    "`out_dim` of both: then `patch_out_dim` must equal `out_dim`"
                )
        warn_if_norms_are_frozen(student_head)
        student_head.attach_output("logits")
        teacher_head.attach_output("scores")
        student_head.temperature = self.student_temp
        self._heads = heads

    def forward(
        self,
        student_output: tuple[Tensor, Tensor],
        teacher_output: tuple[Tensor, Tensor],
        student_local_cls: Tensor | None,
        student_mask: Sequence[Tensor],
        epoch: int,
        *,
        commit: bool = True,
    ) -> dict[str, Tensor]:
        """The losses of what the attached heads returned, then one update of both centres.

        `student_output` and `teacher_output`: [CLS] (ngcrops * B, K) and patches (ngcrops * B, N, K2) of the global
        crops, crop by crop. `student_local_cls`: (nlcrops * B, K) or None without local crops. `student_mask`: for each
        global crop (at least) the masked patches (B, H, W) with H * W = N, bool. When gradients are accumulated over
        micro-batches, commit=False on all but the last makes one update of the centres from all of them.
        """
        student_cls, student_patch = student_output
        teacher_cls, teacher_patch = teacher_output
        if student_local_cls is not None:
            student_cls = torch.cat([student_cls, student_local_cls])
        self._check_shapes(student_cls, student_patch, teacher_cls, teacher_patch, student_mask)
        cls, patch = self._teacher(epoch)

        log_p = (at_least_float32(student_cls) / self.student_temp).log_softmax(dim=-1).chunk(self.ncrops)
        total_cls = student_cls.new_zeros((), dtype=log_p[0].dtype)
        for q, target in enumerate(self._targets(teacher_cls, cls).chunk(self.ngcrops)):
            for v in range(self.ncrops):
                if v != q:  # the same view of the same image teaches nothing
                    total_cls = total_cls - (target * log_p[v]).sum(dim=-1).mean()

        total_patch = torch.zeros_like(total_cls)
        views = zip(student_patch.chunk(self.ngcrops), teacher_patch.chunk(self.ngcrops), student_mask, strict=False)
        for student_tokens, teacher_tokens, mask in views:
            log_p_patch = (at_least_float32(student_tokens) / self.student_temp).log_softmax(dim=-1)
            of_patch = -(self._targets(teacher_tokens, patch) * log_p_patch).sum(dim=-1)  # (B, N)
            weight = mask.flatten(-2).to(of_patch.dtype)
            total_patch = total_patch + ((of_patch * weight).sum(dim=-1) / weight.sum(dim=-1).clamp(min=1)).mean()

        self.update_center(teacher_cls, teacher_patch, epoch, commit=commit)
        loss_cls = self.lambda1 * total_cls / (self.ngcrops * (self.ncrops - 1))
        loss_patch = self.lambda2 * total_patch / self.ngcrops
        return {"cls": loss_cls, "patch": loss_patch, "loss": loss_cls + loss_patch}

    @torch.no_grad()
    def targets(self, teacher_output: tuple[Tensor, Tensor], epoch: int) -> tuple[Tensor, Tensor]:
        """The teacher's probabilities of [CLS] (..., K) and patch tokens (..., K2), Eq. 7; the centres stay as they
        are."""
        cls, patch = self._teacher(epoch)
        return self._targets(teacher_output[0], cls), self._targets(teacher_output[1], patch)

    @torch.no_grad()
    def update_center(self, teacher_cls: Tensor, teacher_patch: Tensor, epoch: int, *, commit: bool = True) -> None:
        """One step of both centres from this batch, over all ranks; `forward` calls it.

        commit=False only adds the batch to those that the next step will average.
        """
        for scores, side in zip((teacher_cls, teacher_patch), self._teacher(epoch), strict=True):
            if side.centering is not None:
                side.centering.convert_logit_center_(side.temperature)
                statistics = side.centering.log_sum(scores, side.temperature, log_normalizer=side.log_normalizer)
                side.centering.accumulate_(*statistics)
            else:
                rows = at_least_float32(scores).flatten(0, -2)
                logit_sum = rows.sum(dim=0) + len(rows) * side.temperature * side.log_normalizer
                side.logit_sum.accumulate_(logit_sum, len(rows))
        if commit:
            self._commit()

    @torch.no_grad()
    def _targets(self, scores: Tensor, side: _Teacher) -> Tensor:
        offset = side.log_normalizer - offset_at(side.centering, side.center, side.temperature)
        return torch.softmax(at_least_float32(scores) / side.temperature + offset, dim=-1)

    def _commit(self) -> None:
        if self.centering is not None and self.centering2 is not None:
            self.centering.commit_()
            self.centering2.commit_()
        else:
            self._logit_sum.commit_(self.center, self.center_momentum, self.process_group)
            self._logit_sum2.commit_(self.center2, self.center_momentum2, self.process_group)

    def _teacher(self, epoch: int) -> tuple[_Teacher, _Teacher]:
        """What turns the teacher's scores of [CLS] and of patches into targets at this epoch."""
        if self._heads is None:
            raise RuntimeError("call `attach(student, teacher)` once before the loss: it owns the heads' temperatures")
        head = self._heads[1]
        norms, norms2 = head.last_prototype_norms, head.last_patch_prototype_norms
        if norms is None or norms2 is None:
            raise RuntimeError(
                "the attached teacher's head has not run on sequences of tokens: call the teacher before the loss"
            )
        # The same prototypes have another kappa at each temperature, so a shared head has two normalisers, too.
        temperature = temperature_at(self.teacher_temp_schedule, epoch)
        temperature2 = temperature_at(self.teacher_temp2_schedule, epoch)
        by_logit = self.centering is None
        return (
            _Teacher(
                temperature,
                head.log_normalizer(temperature, norms),
                self.centering,
                self.center if by_logit else None,
                self._logit_sum,
            ),
            _Teacher(
                temperature2,
                head.log_normalizer(temperature2, norms2),
                self.centering2,
                self.center2 if by_logit else None,
                self._logit_sum2,
            ),
        )

    def _check_shapes(
        self,
        student_cls: Tensor,
        student_patch: Tensor,
        teacher_cls: Tensor,
        teacher_patch: Tensor,
        student_mask: Sequence[Tensor],
    ) -> None:
        images, left_over = divmod(len(teacher_cls), self.ngcrops)
        if left_over or teacher_cls.shape[1:] != (self.out_dim,):
            raise ValueError(
                f"`teacher_output[0]` (of shape {tuple(teacher_cls.shape)}) must be (`ngcrops` * B, `out_dim`) with "
                f"`ngcrops` (={self.ngcrops}) and `out_dim` (={self.out_dim})"
            )
        if student_cls.shape != (self.ncrops * images, self.out_dim):
            raise ValueError(
                f"`student_output[0]` and `student_local_cls` (together of shape {tuple(student_cls.shape)}) must be "
                f"(`ncrops` * B, `out_dim`) = {(self.ncrops * images, self.out_dim)} for B={images}"
            )
        for name, patches in (("student_output[1]", student_patch), ("teacher_output[1]", teacher_patch)):
            if patches.dim() != 3 or len(patches) != len(teacher_cls) or patches.shape[2] != self.patch_out_dim:
                raise ValueError(
                    f"`{name}` (of shape {tuple(patches.shape)}) must be ({len(teacher_cls)}, N, `patch_out_dim`) with "
                    f"`patch_out_dim` (={self.patch_out_dim})"
                )
        tokens = student_patch.shape[1]
        shapes = [tuple(mask.shape) for mask in student_mask[: self.ngcrops]]
        if len(shapes) < self.ngcrops or any(len(s) != 3 or s[0] != images or s[1] * s[2] != tokens for s in shapes):
            raise ValueError(
                f"`student_mask` (of shapes {shapes}) must hold a mask (B, H, W) for each of the {self.ngcrops} global "
                f"crops, with B={images} and H * W={tokens}"
            )

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_heads": None}  # a copy is not attached and does not carry the models along

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The state of iBOT's loss, with `log_center` and `log_center2` in place of `center` and `center2` where
        centring is in probability space."""
        state = super().state_dict(*args, prefix=prefix, **kwargs)
        rename_keys_(state, prefix, _STATE_NAMES)
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.centering is not None:
            rename_keys_(state_dict, prefix, _LOADED_NAMES)
        super()._load_from_state_dict(state_dict, prefix, *args)


class _Teacher(NamedTuple):
    """How one objective reads the teacher's scores."""

    temperature: float
    log_normalizer: Tensor  # log C_p at this temperature (K,), up to a constant
    centering: ProbabilityCentering | None
    center: Tensor | None  # with logit centring, where there is no `centering`
    logit_sum: LogitSum


def _find_ibot_head(model: nn.Module, name: str) -> iBOTHead:
    head = find_head(model, name)
    if not isinstance(head, iBOTHead):
        raise ValueError(f"the head in `{name}` (a {type(head).__name__}) must be a vmf_heads.compat.ibot.iBOTHead")
    return head
