"""A teacher's head whose logits go into a loss that knows nothing of log C_p, such as DINO's own."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from torch import Tensor

DEFAULT_TEMPERATURE = 0.1


class UnattachedTeacher:
    """Warns once of a head that looks like a teacher's, has norms other than 1, and was not told its temperature.

    It looks like one if it is in training mode and its output requires no gradients. The logits of a student are right
    under any loss that divides by the student's temperature; those of a teacher contain log C_p at that temperature
    instead of the teacher's, and a logit centre absorbs what is left of it. The norms are read from the device after
    1, 2, 4, 8, ... such calls only.
    """

    def __init__(self) -> None:
        self._calls = 0

    def notice(self, training: bool, scores: Tensor, temperature: float, norms: Callable[[], Tensor]) -> None:
        """Called by a head that is not attached to any loss and whose call names no temperature."""
        if self._calls < 0 or not training or scores.requires_grad or temperature != DEFAULT_TEMPERATURE:
            return
        self._calls += 1
        if self._calls & (self._calls - 1) or not _differ_from_one(norms()):
            return
        self._calls = -1
        warnings.warn(
            "this head looks like a teacher's (in training mode, without gradients), and its logits contain log C_p at "
            f"temperature {DEFAULT_TEMPERATURE}, the default. A loss that is not attached to it and divides them by "
            "another temperature, as DINO's own does, has wrong targets. Use a loss of vmf_heads.compat, or "
            "vmf_heads.TeacherTargets in a loss of yours; or tell the head its temperature: set_temperature(teacher, t)"
            ", or head(x, temperature=t) for each call",
            UserWarning,
            stacklevel=4,
        )


def _differ_from_one(norms: Tensor) -> bool:
    try:
        return bool(((norms - 1).abs() > 1e-3).any())
    except RuntimeError:  # these have no values to look at: on the meta device, or batched by torch.func.vmap
        return False
