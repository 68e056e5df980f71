"""The teacher's centre of one objective, in probability space (Eq. 9) or on logits (Eq. 8), with one interface."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .._checks import one_of
from .._chunked import _CHUNK_BYTES
from .._distributed import all_reduce_sum_
from .._matmul import at_least_float32, autocast_dtype, mm_float32, without_autocast
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
                score_sum = _column_factor(output) * (at_least_float32(output.directions) @ rows.sum(dim=0))
        logit_sum = score_sum + len(rows) * temperature * log_normalizer
        self._logit_sum = logit_sum if self._logit_sum is None else self._logit_sum + logit_sum
        self._rows += len(rows)

    @torch.no_grad()
    def commit_(self) -> None:
        """One step from all that was accumulated, over all ranks; each of them must call it."""
        logit_sum = self.center.new_zeros(self.center.numel()) if self._logit_sum is None else self._logit_sum
        total = torch.cat([logit_sum, logit_sum.new_full((1,), self._rows)])
        all_reduce_sum_(total, self.process_group)
        mean = (total[:-1] / total[-1]).view_as(self.center)
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


def scores_of(output: HeadOutput) -> Tensor:
    """<w, y> (..., K), in float32; under CUDA autocast of operands in half precision, as in the head."""
    rows = output.features.flatten(0, -2)
    return _product(rows, output.directions, _column_factor(output)).unflatten(0, output.features.shape[:-1])


def _chunks_of_scores(output: HeadOutput) -> Iterator[Tensor]:
    """The scores of a few rows at a time, as large as the chunks of the fused loss together with what follows."""
    rows, factor = output.features.flatten(0, -2), _column_factor(output)
    buffers = 4  # scores, logits, log-probabilities and probabilities
    size = _CHUNK_BYTES.get(rows.device.type, 2**25) // (buffers * 4 * len(factor))
    for chunk in rows.split(max(1, size)):
        yield _product(chunk, output.directions, factor)


def _product(rows: Tensor, directions: Tensor, factor: Tensor) -> Tensor:
    half = autocast_dtype(rows.device)
    with without_autocast(rows.device):
        if half is not None:
            return mm_float32(rows.to(half), directions.T.to(half)).mul_(factor)
        return (at_least_float32(rows) @ at_least_float32(directions).T).mul_(factor)


def _column_factor(output: HeadOutput) -> Tensor:
    """What turns products with the directions into products with the prototypes (K,)."""
    return output.scales / torch.linalg.vector_norm(at_least_float32(output.directions), dim=1)
