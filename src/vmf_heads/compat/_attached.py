"""What all losses with a centre are: attached to two heads, and saved under the names of the original's state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from .._checks import positive
from ..head import VMFPrototypeHead
from ._attach import attach_heads, find_head, fused_output, submodule, warn_if_norms_are_frozen
from ._centre import Centre
from ._objective import Objective


class AttachedLoss(nn.Module):
    """A loss that works on what the heads of a student and a teacher return, and owns their temperatures."""

    centering: Centre
    # Where the centres' buffers stand in the loss, and their names in its state dict.
    STATE_NAMES: ClassVar[dict[str, str]] = {
        "centering.log_center": "log_center",
        "centering.logit_center": "logit_center",  # while the conversion of a loaded centre is pending
        "centering.center": "center",
    }
    HEAD: ClassVar[type[VMFPrototypeHead]] = VMFPrototypeHead

    def __init__(self, student_temp: float, *, fused: bool = False, **numbers: int) -> None:
        """`numbers`: of the prototypes that both heads must have, by the names of the heads' attributes."""
        super().__init__()
        self._numbers = numbers
        self.student_temp = positive("student_temp", student_temp)
        self.fused = fused
        # In a tuple, so that the heads do not become submodules and are not saved with the loss.
        self._heads: tuple[Any, Any] | None = None
        self.register_load_state_dict_post_hook(_use_the_names_of_the_state)

    @property
    def center(self) -> Any:
        """The buffer of the original loss, with logit centring only."""
        return self.centering.center

    def attach(self, student: nn.Module, teacher: nn.Module, head: str | None = None) -> None:
        """Find the head in `student` and in `teacher` (through DDP, FSDP or compile) and take over their temperatures.

        From now on the student's head returns logits at `student_temp`, the teacher's raw scores. With fused=True both
        return features, or a `HeadOutput` under FSDP2 and DDP(find_unused_parameters=True). `head` names the submodule
        to look in where the models hold several heads ("dino_head" in DINOv2). Two losses may share a head whose
        student temperature they agree on. Calling it again with the same models does nothing.

        Raises ValueError unless there is exactly one head in each and both are of a kind with the loss's numbers of
        prototypes, RuntimeError if a head already serves another loss in another way; warns if the student's norms are
        frozen.
        """
        student_head = find_head(submodule(student, "student", head), "student", self.HEAD)
        teacher_head = find_head(submodule(teacher, "teacher", head), "teacher", self.HEAD)
        outputs = ("logits", "scores")
        if self.fused:
            outputs = (fused_output(student, student_head), fused_output(teacher, teacher_head))
        attach_heads(student_head, teacher_head, outputs=outputs, student_temp=self.student_temp, **self._numbers)
        warn_if_norms_are_frozen(student_head)
        self._heads = (student_head, teacher_head)

    def _attached(self) -> tuple[Any, Any]:
        if self._heads is None:
            raise RuntimeError("call `attach(student, teacher)` once before the loss: it owns the heads' temperatures")
        found = self._heads[0].temperature
        if found != self.student_temp:
            raise RuntimeError(
                f"`temperature` of the student's head (={found}) must stay the loss's `student_temp` "
                f"(={self.student_temp}) after `attach`: the loss divides by it"
            )
        return self._heads

    def _objective(self, centering: Centre, temperature: float, norms: Tensor | None) -> Objective:
        """The objective of this centre; `norms` (K,) of the prototypes that the teacher's last forward used."""
        if norms is None:
            raise RuntimeError("the attached teacher's head has not run: call the teacher before the loss")
        student, teacher = self._attached()
        log_normalizer = teacher.log_normalizer(temperature, norms.detach())
        return Objective(centering, temperature, log_normalizer, exact=student.logits_dtype is not None)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_heads": None}  # a copy is not attached and does not carry the models along

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The state of the original loss, with `log_center` in place of `center` for probability centring."""
        state = super().state_dict(*args, prefix=prefix, **kwargs)
        _rename_keys(state, prefix, self.STATE_NAMES)
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        _rename_keys(state_dict, prefix, {outside: inside for inside, outside in self.STATE_NAMES.items()})
        super()._load_from_state_dict(state_dict, prefix, *args)


def _use_the_names_of_the_state(loss: AttachedLoss, incompatible_keys: Any) -> None:
    """What load_state_dict reports as missing or unexpected has the names of the state dict."""
    for keys in incompatible_keys:
        for inside, outside in loss.STATE_NAMES.items():
            keys[:] = [key.removesuffix(inside) + outside if key.endswith(inside) else key for key in keys]


def _rename_keys(state: dict[str, Any], prefix: str, names: Mapping[str, str]) -> None:
    """Rename the keys `prefix + old` of a state dict to `prefix + new`, in place, where they exist."""
    for old, new in names.items():
        if prefix + old in state:
            state[prefix + new] = state.pop(prefix + old)
