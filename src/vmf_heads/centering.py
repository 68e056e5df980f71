"""The teacher's targets (Eq. 7) and the centres they subtract, in probability space (Eq. 9) or on logits (Eq. 8)."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ._checks import at_least, one_of, positive
from ._distributed import all_reduce_sum_
from ._matmul import at_least_float32, linear_float32
from ._memory import rows_per_chunk
from ._shards import Exchange, Shards, exchanges, shards_of
from .prototypes import HeadOutput, local_prototypes

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Centering", "LogitCentering", "ProbabilityCentering", "make_centering", "teacher_targets"]

CENTERING = ("probability", "logit")
CENTER_ON = ("scores", "responsibilities")
CENTER_START = ("zeros", "first_batch")
# exp() of a log-sum leaves the range of float64 below this: the centre of a prototype that nothing ever chooses.
_FLOOR = math.log(torch.finfo(torch.float64).tiny)


@torch.no_grad()
def teacher_targets(
    scores: Tensor, temperature: float, *, log_normalizer: Tensor | None = None, log_center: Tensor | None = None
) -> Tensor:
    """The teacher's probabilities, Eq. 7, from its raw scores.

    Equals::

        softmax(scores / temperature + log_normalizer - log_center, dim=-1)

    Args:
        scores: <w_k, y> (..., K), of any floating dtype; half precision is cast up to float32.
        temperature: tau_t > 0.
        log_normalizer: log C_p(||w_k|| / temperature) (K,) up to a constant, such as `head.log_normalizer(temperature)`
            gives. None: zeros, which is plain DINO.
        log_center: c (K,), such as `centering.offset(temperature)` gives. None: zeros.

    Returns:
        Probabilities (..., K), in float32 (float64 for float64 scores), without gradient.

    Raises:
        ValueError, TypeError: `temperature` is not a finite number > 0.

    Reference: Govindarajan et al., ICLR 2023, Eq. 7.

    >>> import torch
    >>> from vmf_heads.centering import teacher_targets
    >>> teacher_targets(torch.tensor([[0.2, 0.1, 0.0]]), 0.1, log_center=torch.tensor([1.0, 0.0, 0.0]))
    tensor([[0.4223, 0.4223, 0.1554]])
    """
    positive("temperature", temperature)
    logits = at_least_float32(scores) / temperature
    if log_normalizer is None:
        return torch.softmax(logits if log_center is None else logits - log_center, dim=-1)
    offset = log_normalizer if log_center is None else log_normalizer - log_center
    return torch.softmax(logits + offset, dim=-1)


class _RunningCenter(nn.Module):
    """What both centres have in common: a group of ranks, which is not part of what a copy copies."""

    process_group: ProcessGroup | None

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        memo[id(self.process_group)] = self.process_group  # a handle to connections: it cannot be copied, but shared
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return copied


class ProbabilityCentering(_RunningCenter):
    """The running centre c_k of DINO-vMF, an average of probabilities instead of logits (Eq. 9).

    Equals, for scores <w, y_b> (B, K) and temperature tau::

        c = momentum * c + (1 - momentum) * log(softmax(scores / tau + log_normalizer, dim=1).mean(dim=0))

    without log C_p in the softmax if `center_on` is "scores". It is computed in log space and averaged over all ranks
    before the logarithm, so that it neither becomes -inf nor depends on how a batch is split. Calling the module
    subtracts c from logits that are already divided by the temperature; `teacher_targets` is all of Eq. 7.

    Args:
        num_prototypes: K.
        momentum: m in [0, 1]; 0.9 in DINO.
        center_on: "responsibilities" averages what Eq. 2 assigns, log C_p included, as appendix A.4 words it: every
            prototype is a target equally often, up to the normaliser of Eq. 7. "scores" leaves log C_p out of the
            softmax, as Eq. 9 is printed: a prototype is a target in proportion to its C_p, so that concentrated
            ones starve once the norms move (docs/evidence.md).
        start: "zeros": the first batch moves the centre from 0 by 1 - momentum, as in DINO. "first_batch": it sets it,
            as in stable-pretraining.
        process_group: the ranks to average over; None means all of them. Without torch.distributed it is local.

    State: the buffer `log_center` (K,), float32. It is not called `center` because DINO's centre lives in another
    space: a state dict with a `center` loads as a pending logit centre, see `convert_logit_center_`.

    Raises:
        ValueError, TypeError: an argument is out of its range or a tensor has the wrong shape.

    Reference: Govindarajan et al., ICLR 2023, Eq. 7, Eq. 9, appendix A.4.

    >>> import torch
    >>> from vmf_heads import ProbabilityCentering
    >>> centering = ProbabilityCentering(3)
    >>> scores = torch.tensor([[0.3, 0.1, 0.0], [0.2, 0.0, 0.1]])
    >>> log_normalizer = torch.zeros(3)  # prototypes of norm 1; in general `teacher_head.log_normalizer(0.04)`
    >>> targets = torch.softmax(centering(scores / 0.04 + log_normalizer), dim=1)  # Eq. 7
    >>> centering.update_(scores, temperature=0.04, log_normalizer=log_normalizer)
    >>> centering.log_center
    tensor([-0.0045, -0.5045, -0.3271])
    """

    log_center: Tensor
    logit_center: Tensor | None

    def __init__(
        self,
        num_prototypes: int,
        momentum: float = 0.9,
        *,
        center_on: str = "responsibilities",
        start: str = "zeros",
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.momentum = check_momentum("momentum", momentum)
        self.center_on = one_of("center_on", center_on, CENTER_ON)
        self.start = one_of("start", start, CENTER_START)
        self.process_group = process_group
        self.register_buffer("log_center", torch.empty(at_least("num_prototypes", num_prototypes, 1)))
        self.register_buffer("logit_center", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A centre of 0 and nothing accumulated, as the constructor leaves it; also after `to_empty`."""
        nn.init.zeros_(self.log_center)
        self.logit_center = None
        self._log_sum: Tensor | None = None  # accumulated since the last commit_
        self._rows = 0

    def forward(self, logits: Tensor) -> Tensor:
        """`logits` (..., K), already divided by the temperature, minus the centre."""
        self._check_columns("logits", logits)
        self._check_converted()
        return logits - self.log_center

    def offset(self, temperature: float) -> Tensor:
        """The centre c (K,) that Eq. 7 subtracts at this temperature; nothing changes by asking."""
        return (
            self.log_center if self.logit_center is None else self.logit_center / positive("temperature", temperature)
        )

    @torch.no_grad()
    def update_(self, scores: Tensor | HeadOutput, temperature: float, *, log_normalizer: Tensor | None = None) -> None:
        """One step of Eq. 9 from the teacher's raw scores of this batch, on every rank: `accumulate_`, `commit_`."""
        self.accumulate_(scores, temperature, log_normalizer=log_normalizer)
        self.commit_()

    @torch.no_grad()
    def accumulate_(
        self, scores: Tensor | HeadOutput, temperature: float, *, log_normalizer: Tensor | None = None
    ) -> None:
        """Add one micro-batch. The centre changes at `commit_` only.

        Args:
            scores: the teacher's raw scores <w, y> (..., K), or a `HeadOutput`, whose scores are made in chunks.
            temperature: tau_t > 0.
            log_normalizer: log C_p (K,) up to a constant. Needed for center_on="responsibilities", ignored otherwise.
        """
        positive("temperature", temperature)
        bias = None
        if self.center_on == "responsibilities":
            if log_normalizer is None:
                raise ValueError('`log_normalizer` (=None) must be given when `center_on` is "responsibilities"')
            bias = log_normalizer
        if isinstance(scores, Tensor):
            self._check_columns("scores", scores)
        shards = shards_of(scores.directions, "scores.directions") if isinstance(scores, HeadOutput) else None
        rows = _as_rows(scores.features if isinstance(scores, HeadOutput) else scores)
        (exchange,) = exchanges(shards, rows)
        columns = slice(None) if shards is None else shards.columns
        log_sum = torch.full_like(self.log_center[columns], -torch.inf)
        for chunk in _score_chunks(scores, shards, exchange):
            logits = at_least_float32(chunk) / temperature
            log_probabilities = exchange.log_softmax(logits if bias is None else logits.add_(bias[columns]))
            log_sum = torch.logaddexp(log_sum, torch.logsumexp(log_probabilities, dim=0))
        self.convert_logit_center_(temperature)
        self.accumulate_log_sum_(log_sum if shards is None else shards.spread(log_sum, -torch.inf), len(rows))

    @torch.no_grad()
    def accumulate_log_sum_(self, log_sum: Tensor, rows: int) -> None:
        """Add one micro-batch by what `prototype_cross_entropy` returns: log sum_b softmax_k (K,) over `rows` rows."""
        self._check_columns("log_sum", log_sum)
        self._log_sum = log_sum if self._log_sum is None else torch.logaddexp(self._log_sum, log_sum)
        self._rows += rows

    @torch.no_grad()
    def commit_(self) -> None:
        """One EMA step from all that was accumulated, over all ranks.

        Every rank must call it, also one without rows; without any rows nothing changes.
        """
        self._check_converted()
        log_sum = torch.full_like(self.log_center, -torch.inf) if self._log_sum is None else self._log_sum
        # Probabilities are summed before the logarithm: a mean of the ranks' logarithms is another number.
        count = log_sum.new_full((1,), self._rows, dtype=torch.float64)
        total = all_reduce_sum_(torch.cat([log_sum.double().exp(), count]), self.process_group)
        mean = (total[:-1] / total[-1]).log().clamp(min=_FLOOR).to(self.log_center.dtype)
        updated = self.momentum * self.log_center + (1 - self.momentum) * mean
        if self.start == "first_batch":
            updated = _first_sets(self.log_center, mean, updated)
        # torch.where instead of a branch: whether any rank had rows is known on the device only.
        self.log_center.copy_(torch.where(total[-1] > 0, updated, self.log_center))
        self._log_sum, self._rows = None, 0

    @torch.no_grad()
    def convert_logit_center_(self, temperature: float) -> None:
        """Turn a loaded DINO centre (in units of scores) into `log_center` = center / temperature, or do nothing.

        `accumulate_` does it by itself. `temperature` is the teacher's at this moment of training.
        """
        if self.logit_center is None:
            return
        self.log_center.copy_(self.logit_center / positive("temperature", temperature))
        self.logit_center = None
        warnings.warn(
            "a DINO logit `center` was loaded into ProbabilityCentering and divided by the teacher temperature "
            f"{temperature}; it adapts to Eq. 9 within about {round(5 / max(1 - self.momentum, 1e-3))} updates",
            UserWarning,
            stacklevel=2,
        )

    def extra_repr(self) -> str:
        """What print(module) shows."""
        return f"num_prototypes={self.log_center.numel()}, momentum={self.momentum}, center_on={self.center_on!r}"

    def _check_converted(self) -> None:
        if self.logit_center is not None:
            raise RuntimeError(
                "a DINO `center` was loaded, which is in units of scores; call "
                "`convert_logit_center_(teacher_temperature)` once before centring"
            )

    def _check_columns(self, name: str, tensor: Tensor) -> None:
        if tensor.shape[-1:] != self.log_center.shape:
            raise ValueError(
                f"`{name}` (of shape {tuple(tensor.shape)}) must end in `num_prototypes` (={self.log_center.numel()})"
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if prefix + "center" in state_dict:
            state_dict[prefix + "logit_center"] = state_dict.pop(prefix + "center").flatten()
            state_dict[prefix + "log_center"] = self.log_center
        # Exists as a buffer only while a conversion is pending; such a state can be saved and loaded, too.
        if prefix + "logit_center" in state_dict:
            self.logit_center = torch.zeros_like(self.log_center)
        elif prefix + "log_center" in state_dict:
            self.logit_center = None
        super()._load_from_state_dict(state_dict, prefix, *args)


class LogitCentering(_RunningCenter):
    """DINO's running mean of the teacher's logits (Eq. 8), here of logits with log C_p; same interface as Eq. 9's.

    Args:
        shape: of the buffer `center`, as the original has it, with shape[-1] = K.
        momentum: m in [0, 1].
        process_group: the ranks to average over; None means all of them.
        start: "zeros" or "first_batch", see `ProbabilityCentering`.

    A `center` of any shape with K elements loads.

    Reference: Caron et al., ICCV 2021; Govindarajan et al., ICLR 2023, Eq. 8.
    """

    center: Tensor
    center_on: ClassVar[str] = "scores"  # what a fused loss averages on the way; this centre does not use it

    def __init__(
        self,
        shape: tuple[int, ...],
        momentum: float,
        process_group: ProcessGroup | None = None,
        *,
        start: str = "zeros",
    ) -> None:
        super().__init__()
        self.momentum = check_momentum("momentum", momentum)
        self.start = one_of("start", start, CENTER_START)
        self.process_group = process_group
        self.register_buffer("center", torch.empty(shape))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A centre of 0 and nothing accumulated, as the constructor leaves it; also after `to_empty`."""
        nn.init.zeros_(self.center)
        self._logit_sum: Tensor | None = None  # accumulated since the last commit_
        self._rows = 0

    def offset(self, temperature: float) -> Tensor:
        """What the teacher's logits lose before the softmax (K,)."""
        return self.center.flatten() / temperature

    @torch.no_grad()
    def accumulate_(self, scores: Tensor | HeadOutput, temperature: float, *, log_normalizer: Tensor) -> None:
        """Add the teacher's scores (..., K), or the features they come from, to what the next `commit_` averages."""
        if isinstance(scores, HeadOutput):
            score_sum, rows = scores.score_sum(), scores.features[..., 0].numel()
        else:
            score_sum, rows = at_least_float32(_as_rows(scores)).sum(dim=0), scores[..., 0].numel()
        logit_sum = score_sum + rows * temperature * log_normalizer
        self._logit_sum = logit_sum if self._logit_sum is None else self._logit_sum + logit_sum
        self._rows += rows

    @torch.no_grad()
    def commit_(self) -> None:
        """One step from all that was accumulated, over all ranks; each of them must call it."""
        logit_sum = self.center.new_zeros(self.center.numel()) if self._logit_sum is None else self._logit_sum
        total = torch.cat([logit_sum, logit_sum.new_full((1,), self._rows)])
        all_reduce_sum_(total, self.process_group)
        mean = (total[:-1] / total[-1]).view_as(self.center).to(self.center.dtype)
        updated = self.center.lerp(mean, 1 - self.momentum)
        if self.start == "first_batch":
            updated = _first_sets(self.center, mean, updated)
        # torch.where instead of a branch: whether any rank had rows is known on the device only.
        self.center.copy_(torch.where(total[-1] > 0, updated, self.center))
        self._logit_sum, self._rows = None, 0

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        center = state_dict.get(prefix + "center")
        if center is not None and center.numel() == self.center.numel():  # (1, K) in DINO, (1, 1, K) in lightly
            state_dict[prefix + "center"] = center.view_as(self.center)
        super()._load_from_state_dict(state_dict, prefix, *args)


Centering = ProbabilityCentering | LogitCentering


def make_centering(
    shape: tuple[int, ...],
    momentum: float,
    *,
    centering: str,
    center_on: str,
    center_start: str = "zeros",
    process_group: ProcessGroup | None,
) -> Centering:
    """The centre that `centering` names, for shape[-1] prototypes.

    Args:
        shape: of the original's buffer.
        momentum: m in [0, 1].
        centering: "probability" or "logit".
        center_on: see `ProbabilityCentering`.
        center_start: "zeros" or "first_batch", see `ProbabilityCentering`.
        process_group: the ranks to average over; None means all of them.
    """
    check_momentum("center_momentum", momentum)
    one_of("center_start", center_start, CENTER_START)
    if one_of("centering", centering, CENTERING) == "logit":
        return LogitCentering(shape, momentum, process_group, start=center_start)
    return ProbabilityCentering(
        shape[-1], momentum, center_on=center_on, start=center_start, process_group=process_group
    )


def _first_sets(center: Tensor, mean: Tensor, updated: Tensor) -> Tensor:
    """`mean` where the centre is still that of the start, else `updated`.

    Only the start is 0 throughout: the logarithms of probabilities over several prototypes are not.
    """
    return torch.where((center == 0).all(), mean, updated)


def check_momentum(name: str, value: float) -> float:
    """`value`, or an error that names the argument unless it is in [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"`{name}` (={value}) must be in [0, 1]")
    return value


def _as_rows(tensor: Tensor) -> Tensor:
    """(..., K) as (N, K)."""
    return tensor.flatten(0, -2) if tensor.dim() > 1 else tensor.unsqueeze(0)


def _score_chunks(scores: Tensor | HeadOutput, shards: Shards | None, exchange: Exchange) -> Iterator[Tensor]:
    """The scores (rows, K), few rows at a time: scores, logits and log-probabilities stay within the memory budget.

    Where the prototypes are cut over ranks: the rows of all of these, with this rank's prototypes.
    """
    if isinstance(scores, Tensor):
        yield from _as_rows(scores).split(rows_per_chunk(scores.shape[-1], scores.device, buffers=3))
        return
    prototypes = local_prototypes(scores).prototypes
    columns = len(prototypes) if shards is None else shards.most  # so that all ranks have as many chunks
    for features in exchange.gather(_as_rows(scores.features)).split(
        rows_per_chunk(columns, prototypes.device, buffers=4)
    ):
        yield linear_float32(features, prototypes)
