"""What the losses of lightly and DINOv2 share: one centre, and the teacher's temperature as an argument."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from .._checks import at_least
from ._attached import AttachedLoss
from ._centre import make_centre
from ._objective import Objective

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class CentredLoss(AttachedLoss):
    """A loss with one centre that is told the teacher's temperature with every call.

    State dict: `log_center` (K,) with probability centring (Eq. 9); `center`, of the original's shape, with logit
    centring (Eq. 8). A `center` of the original loads into either.
    """

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
        super().__init__(student_temp, num_prototypes=at_least("out_dim", out_dim, 1))
        self.num_prototypes = out_dim
        self.center_momentum = center_momentum
        self.centering = make_centre(
            center_shape, center_momentum, centering=centering, center_on=center_on, process_group=process_group
        )

    def _targets(self, name: str, scores: Tensor, temperature: float) -> Tensor:
        """Eq. 7 (..., K) of the teacher's raw scores (..., K); the centre stays as it is."""
        self._check_columns(name, scores)
        return self._at(temperature).targets(scores)

    def _accumulate(self, name: str, scores: Tensor, temperature: float) -> None:
        """Add these scores (..., K) to what the next step of the centre averages."""
        self._check_columns(name, scores)
        self._at(temperature).accumulate_(scores)

    def _at(self, temperature: float) -> Objective:
        return self._objective(self.centering, temperature, self._attached()[1].last_prototype_norms)

    def _check_columns(self, name: str, tensor: Tensor) -> None:
        if tensor.dim() < 2 or tensor.shape[-1] != self.num_prototypes:
            raise ValueError(f"`{name}` (of shape {tuple(tensor.shape)}) must be (..., {self.num_prototypes})")
