"""The teacher's centre of one objective, in probability space (Eq. 9) or on logits (Eq. 8), with one interface."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .._checks import one_of
from .._chunked import rows_in_budget
from .._distributed import all_reduce_sum_
from .._epilogues import affine_
from .._matmul import at_least_float32, autocast_dtype, without_autocast
from .._weight_norm import WeightNormed
from ..centering import ProbabilityCentering
from ..head import HeadOutput

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

CENTERING = ("probability", "logit")


class ProbabilityCentre(ProbabilityCentering):
    """Eq. 9."""

    def offset(self, temperature: float) -> Tensor:
        """What the teacher's logits lose before the softmax (K,)."""
        self.convert_logit_center_(temperature)
        return self.log_center

    @torch.no_grad()
    def add_(self, output: Tensor | HeadOutput, temperature: float, log_normalizer: Tensor) -> None:
        """Add the teacher's scores (..., K), or the features they come from, to what the next `commit_` averages."""
        self.convert_logit_center_(temperature)
        for scores in [output] if isinstance(output, Tensor) else _chunks_of_scores(output):
            self.accumulate_(*self.log_sum(scores, temperature, log_normalizer=log_normalizer))


class LogitCentre(nn.Module):
    """Eq. 8, on logits with log C_p; the buffer `center` has the original's shape."""

    center: Tensor

    def __init__(self, shape: tuple[int, ...], momentum: float, process_group: ProcessGroup | None) -> None:
        super().__init__()
        self.momentum = momentum
        self.process_group = process_group
        self.register_buffer("center", torch.zeros(shape))
        self._logit_sum: Tensor | None = None  # accumulated since the last commit_
        self._rows = 0

    @property
    def value(self) -> Tensor:
        """The centre, by lightly's name."""
        return self.center

    def offset(self, temperature: float) -> Tensor:
        """What the teacher's logits lose before the softmax (K,)."""
        return self.center.flatten() / temperature

    @torch.no_grad()
    def add_(self, output: Tensor | HeadOutput, temperature: float, log_normalizer: Tensor) -> None:
        """Add the teacher's scores (..., K), or the features they come from, to what the next `commit_` averages."""
        if isinstance(output, Tensor):
            rows = at_least_float32(output).flatten(0, -2)
            score_sum = rows.sum(dim=0)
        else:  # scores are linear in the features
            rows = at_least_float32(output.features).flatten(0, -2)
            with without_autocast(rows.device):
                score_sum = scores_of(output._replace(features=rows.sum(dim=0, keepdim=True)))[0]
        logit_sum = score_sum + len(rows) * temperature * log_normalizer
        self._logit_sum = logit_sum if self._logit_sum is None else self._logit_sum + logit_sum
        self._rows += len(rows)

    @torch.no_grad()
    def commit_(self) -> None:
        """One step from all that was accumulated, over all ranks; each of them must call it."""
        logit_sum = self.center.new_zeros(self.center.numel()) if self._logit_sum is None else self._logit_sum
        total = torch.cat([logit_sum, logit_sum.new_full((1,), self._rows)])
        all_reduce_sum_(total, self.process_group)
        mean = (total[:-1] / total[-1]).view_as(self.center).to(self.center.dtype)
        # torch.where instead of a branch: whether any rank had rows is known on the device only.
        self.center.copy_(torch.where(total[-1] > 0, self.center.lerp(mean, 1 - self.momentum), self.center))
        self._logit_sum, self._rows = None, 0


Centre = ProbabilityCentre | LogitCentre


def make_centre(
    shape: tuple[int, ...],
    momentum: float,
    *,
    centering: str,
    center_on: str,
    process_group: ProcessGroup | None,
    name: str = "center_momentum",
) -> Centre:
    """The centre that `centering` names, for shape[-1] prototypes; `shape` is that of the original's buffer.

    `name` is the momentum's in the error.
    """
    if not 0 <= momentum <= 1:
        raise ValueError(f"`{name}` (={momentum}) must be in [0, 1]")
    if one_of("centering", centering, CENTERING) == "logit":
        return LogitCentre(shape, momentum, process_group)
    return ProbabilityCentre(shape[-1], momentum, center_on=center_on, process_group=process_group)


@torch.no_grad()
def scores_of(output: HeadOutput) -> Tensor:
    """<w, y> (..., K), in float32; under CUDA autocast of operands in half precision, as in the head."""
    *leading, _ = output.features.shape
    (scores,) = _chunks_of_scores(output, rows=math.prod(leading))
    return scores.unflatten(0, leading)


def _chunks_of_scores(output: HeadOutput, rows: int | None = None) -> Iterator[Tensor]:
    """The scores of at most so many rows at a time, each in the memory of the last.

    None: as many as the chunks of the fused loss have, together with what follows.
    """
    features, half = at_least_float32(output.features).flatten(0, -2), autocast_dtype(output.features.device)
    if rows is None:
        buffers = 4  # scores, logits, log-probabilities and probabilities
        rows = rows_in_budget(len(output.scales), features.device, buffers)
    with without_autocast(features.device):
        prototypes = WeightNormed(at_least_float32(output.directions), at_least_float32(output.scales), half)
    buffer = features.new_empty(min(rows, len(features)), len(output.scales))
    for chunk in features.split(max(1, rows)):
        with without_autocast(features.device):
            scores = affine_(prototypes.products(chunk, buffer), prototypes.late_factor, None)
        yield scores
