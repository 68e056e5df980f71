"""What the losses of lightly and DINOv2 share: two attached heads, the teacher's targets, and the centre."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._checks import at_least, one_of, positive
from .._matmul import at_least_float32
from ..centering import ProbabilityCentering
from ..head import VMFPrototypeHead
from ._attach import attach_heads, find_head, warn_if_norms_are_frozen
from ._teacher import CENTERING, LogitSum, offset_at, rename_keys_

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Where the centring's buffers stand in the loss, and their names in its state dict.
_STATE_NAMES = {"centering.log_center": "log_center", "centering.logit_center": "logit_center"}
_LOADED_NAMES = {new: old for old, new in _STATE_NAMES.items()} | {"center": "centering.center"}


class CentredLoss(nn.Module):
    """A loss that is told the teacher's temperature with every call, and works on what the attached heads return.

    State dict: `log_center` (K,) with probability centring (Eq. 9); `center`, of the original's shape, with logit
    centring (Eq. 8). A `center` of the original loads into either.
    """

    center: Tensor

    def __init__(
        self,
        out_dim: int,
        student_temp: float,
        center_momentum: float,
        center_shape: tuple[int, ...],
        centering: str,
        center_on: str,
        process_group: ProcessGroup | None,
    ) -> None:
        super().__init__()
        if not 0 <= center_momentum <= 1:
            raise ValueError(f"`center_momentum` (={center_momentum}) must be in [0, 1]")
        self.num_prototypes = at_least("out_dim", out_dim, 1)
        self.student_temp = positive("student_temp", student_temp)
        self.center_momentum = center_momentum
        self.process_group = process_group
        self.centering: ProbabilityCentering | None = None
        if one_of("centering", centering, CENTERING) == "probability":
            self.centering = ProbabilityCentering(
                out_dim, center_momentum, center_on=center_on, process_group=process_group
            )
        else:
            self.register_buffer("center", torch.zeros(center_shape))
        self._logit_sum = LogitSum()
        # In a tuple, so that the heads do not become submodules and are not saved with the loss.
        self._heads: tuple[VMFPrototypeHead, VMFPrototypeHead] | None = None

    def attach(self, student: nn.Module, teacher: nn.Module, head: str | None = None) -> None:
        """Find the head in `student` and in `teacher` (through DDP, FSDP or compile) and take over their temperatures.

        From now on the student's head returns logits at `student_temp`, the teacher's raw scores. `head` names the
        submodule to look in where the models hold several heads ("dino_head" in DINOv2). Two losses may share a head
        whose student temperature they agree on. Calling it again with the same models does nothing.

        Raises ValueError unless there is exactly one head in each and both are of a kind and have K prototypes,
        RuntimeError if a head already serves another loss in another way; warns if the student's norms are frozen.
        """
        student_head = find_head(_submodule(student, "student", head), "student")
        teacher_head = find_head(_submodule(teacher, "teacher", head), "teacher")
        attach_heads(
            student_head,
            teacher_head,
            outputs=("logits", "scores"),
            num_prototypes=self.num_prototypes,
            student_temp=self.student_temp,
        )
        warn_if_norms_are_frozen(student_head)
        self._heads = (student_head, teacher_head)

    @torch.no_grad()
    def _targets(self, name: str, scores: Tensor, temperature: float) -> Tensor:
        """Eq. 7 (..., K) of the teacher's raw scores (..., K); the centre stays as it is."""
        self._check_columns(name, scores)
        logits = at_least_float32(scores) / temperature + self._log_normalizer(temperature)
        center = None if self.centering is not None else self.center
        return torch.softmax(logits - offset_at(self.centering, center, temperature), dim=-1)

    @torch.no_grad()
    def _accumulate(self, name: str, scores: Tensor, temperature: float) -> None:
        """Add these scores (..., K) to what the next `_commit` averages."""
        self._check_columns(name, scores)
        if self.centering is not None:
            self.centering.convert_logit_center_(temperature)
            wanted = self.centering.center_on == "responsibilities"
            bias = self._log_normalizer(temperature) if wanted else None
            self.centering.accumulate_(*self.centering.log_sum(scores, temperature, log_normalizer=bias))
            return
        rows = at_least_float32(scores).flatten(0, -2)
        bias = temperature * self._log_normalizer(temperature)
        self._logit_sum.accumulate_(rows.sum(dim=0) + len(rows) * bias, len(rows))

    @torch.no_grad()
    def _commit(self) -> None:
        """One step of Eq. 9 or Eq. 8 from what was accumulated, over all ranks; each of them must call it."""
        if self.centering is not None:
            self.centering.commit_()
        else:
            self._logit_sum.commit_(self.center, self.center_momentum, self.process_group)

    def _log_normalizer(self, temperature: float) -> Tensor:
        """log C_p (K,) of the prototypes that the teacher's last forward used, up to a constant."""
        head = self._attached()[1]
        if head.last_prototype_norms is None:
            raise RuntimeError("the attached teacher's head has not run: call the teacher before the loss")
        return head.log_normalizer(temperature, head.last_prototype_norms)

    def _attached(self) -> tuple[VMFPrototypeHead, VMFPrototypeHead]:
        if self._heads is None:
            raise RuntimeError("call `attach(student, teacher)` once before the loss: it owns the heads' temperatures")
        return self._heads

    def _check_columns(self, name: str, tensor: Tensor) -> None:
        if tensor.dim() < 2 or tensor.shape[-1] != self.num_prototypes:
            raise ValueError(f"`{name}` (of shape {tuple(tensor.shape)}) must be (..., {self.num_prototypes})")

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_heads": None}  # a copy is not attached and does not carry the models along

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The state of the original loss, with `log_center` in place of `center` for probability centring."""
        state = super().state_dict(*args, prefix=prefix, **kwargs)
        rename_keys_(state, prefix, _STATE_NAMES)
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.centering is not None:
            rename_keys_(state_dict, prefix, _LOADED_NAMES)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _submodule(model: nn.Module, name: str, head: str | None) -> nn.Module:
    """The outermost submodule of `model` called `head`, at any depth; all of `model` for None."""
    if head is None:
        return model
    for path, module in model.named_modules():
        if path.rpartition(".")[2] == head:
            return module
    raise ValueError(f"`head` (={head!r}) must be the name of a submodule of `{name}` (a {type(model).__name__})")
