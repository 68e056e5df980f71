"""Notices a run that no longer learns anything: targets that are uniform, or the same for every image."""

from __future__ import annotations

import math
from collections.abc import Mapping

from runtime.failure import Failure

SHARE = 0.01
"""An entropy below this share of ln K counts as none."""
FEWEST_IMAGES = 8
"""With fewer images, targets may be alike by chance; then only uniform ones are looked for."""


class TrainingCollapsed(Failure):
    """The run was stopped because its targets have collapsed; the message says how and what helps."""


class CollapseDetector:
    """Raises TrainingCollapsed when the logged statistics show a collapse for `window` steps on end.

    - The targets are uniform and the student has matched them: target entropy ln K, KL(target || student) 0, so that
      the loss sits at ln K.
    - The targets are the same for every image: their marginal entropy is no larger than their own. Mostly one prototype
      has taken all images.

    Both are tested to within 1 % of ln K.

    Args:
        num_prototypes: K.
        window: the number of suspicious steps in a row after which the run is stopped; 0 never stops it.
        images: the number of images behind one process' statistics. With fewer than 8 only uniform targets are
            looked for.
    """

    def __init__(self, num_prototypes: int, window: int, images: int) -> None:
        self.log_k, self.window, self.images = math.log(num_prototypes), window, images
        self._steps = 0

    @property
    def suspicious(self) -> bool:
        """Whether the last step looked collapsed: not a state to keep as the last good one."""
        return self._steps > 0

    def update(self, statistics: Mapping[str, float]) -> None:
        """Look at one step's `target_entropy`, `marginal_entropy` and `kl`, all in nats."""
        if self.window == 0:
            return
        found = self._diagnosis(statistics["target_entropy"], statistics["marginal_entropy"], statistics["kl"])
        self._steps = self._steps + 1 if found else 0
        if self._steps >= self.window:
            raise TrainingCollapsed(f"collapse, for {self._steps} steps now: {found}")

    def _diagnosis(self, entropy: float, marginal: float, kl: float) -> str:
        nothing = SHARE * self.log_k
        if entropy > self.log_k - nothing and kl < nothing:
            return (
                f"all targets are uniform and the student has matched them, the loss sits at ln K = {self.log_k:.2f}. "
                "A lower `teacher_temp` (and `teacher_temp_warmup`) sharpens targets"
            )
        if self.images < FEWEST_IMAGES or marginal - entropy > nothing:
            return ""
        if entropy > self.log_k / 2:
            return (
                "the targets are the same for every image and spread over many prototypes. A lower `teacher_temp` (and "
                "`teacher_temp_warmup`) sharpens targets; a smaller `lr` may avoid the way there"
            )
        return (
            "one prototype, or the same few, has taken all images. Centring prevents that (`center_momentum` 0.9; 1 is "
            "no centring), as does a higher `teacher_temp`; a smaller `lr` may avoid the way there"
        )
