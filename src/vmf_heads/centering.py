"""Centring of the teacher in probability space, Eq. 9."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ._checks import at_least, one_of, positive
from ._distributed import all_reduce_sum_
from ._matmul import at_least_float32

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["ProbabilityCentering"]

CENTER_ON = ("scores", "responsibilities")
# exp() of a log-sum leaves the range of float64 below this: the centre of a prototype that nothing ever chooses.
_FLOOR = math.log(torch.finfo(torch.float64).tiny)
# Rows are taken in chunks of about so many elements: 64 MiB of float32 at a time.
_CHUNK_ELEMENTS = 2**24


class ProbabilityCentering(nn.Module):
    """The running centre c_k of DINO-vMF, an average of probabilities instead of logits (Eq. 9).

    Equals, for scores <w, y_b> (B, K) and temperature tau::

        c = momentum * c + (1 - momentum) * log(softmax(scores / tau, dim=1).mean(dim=0))

    computed in log space and averaged over all ranks before the logarithm, so that it neither becomes -inf nor depends
    on how a batch is split. Calling it subtracts c from logits that are already divided by the temperature (Eq. 7).

    Args:
        num_prototypes: K.
        momentum: m in [0, 1]; 0.9 in DINO.
        center_on: "scores" leaves log C_p out of the softmax, as Eq. 9 is printed; "responsibilities" includes it, as
            appendix A.4 words it. The latter nearly cancels log C_p in Eq. 7 again (docs/method.md).
        process_group: the ranks to average over; None means all of them. Without torch.distributed it is local.

    State: the buffer `log_center` (K,), float32. It is not called `center` because DINO's centre lives in another
    space: a state dict with a `center` loads as a pending logit centre, see `convert_logit_center_`.

    Raises:
        ValueError, TypeError: an argument is out of its range or a tensor has the wrong shape.

    Source: Govindarajan et al., ICLR 2023, Eq. 7, Eq. 9, appendix A.4.

    >>> import torch
    >>> from vmf_heads import ProbabilityCentering
    >>> centering = ProbabilityCentering(3)
    >>> scores = torch.tensor([[0.3, 0.1, 0.0], [0.2, 0.0, 0.1]])
    >>> targets = torch.softmax(centering(scores / 0.04), dim=1)  # Eq. 7 for prototypes of norm 1
    >>> centering.update_(scores, temperature=0.04)
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
        center_on: str = "scores",
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= momentum <= 1:
            raise ValueError(f"`momentum` (={momentum}) must be in [0, 1]")
        self.momentum = momentum
        self.center_on = one_of("center_on", center_on, CENTER_ON)
        self.process_group = process_group
        self.register_buffer("log_center", torch.zeros(at_least("num_prototypes", num_prototypes, 1)))
        self.register_buffer("logit_center", None)
        self._log_sum: Tensor | None = None  # accumulated since the last commit_
        self._rows = 0

    def forward(self, logits: Tensor) -> Tensor:
        """`logits` (..., K), already divided by the temperature, minus the centre."""
        self._check_columns("logits", logits)
        self._check_converted()
        return logits - self.log_center

    @torch.no_grad()
    def update_(self, scores: Tensor, temperature: float, *, log_normalizer: Tensor | None = None) -> None:
        """One step of Eq. 9 from the teacher's raw scores <w, y> (..., K) of this batch, on every rank.

        `log_normalizer` (K,), log C_p up to a constant, is needed for center_on="responsibilities" and ignored
        otherwise.
        """
        self.accumulate_(*self.log_sum(scores, temperature, log_normalizer=log_normalizer))
        self.commit_()

    @torch.no_grad()
    def log_sum(
        self, scores: Tensor, temperature: float, *, log_normalizer: Tensor | None = None
    ) -> tuple[Tensor, int]:
        """(log sum_b softmax_k(scores_b / temperature) (K,), number of rows): what `accumulate_` takes."""
        self._check_columns("scores", scores)
        positive("temperature", temperature)
        bias = None
        if self.center_on == "responsibilities":
            if log_normalizer is None:
                raise ValueError('`log_normalizer` (=None) must be given when `center_on` is "responsibilities"')
            bias = log_normalizer
        rows = scores.flatten(0, -2) if scores.dim() > 1 else scores.unsqueeze(0)
        total = torch.full_like(self.log_center, -torch.inf)
        for chunk in rows.split(max(1, _CHUNK_ELEMENTS // rows.shape[1])):
            logits = at_least_float32(chunk) / temperature
            log_probabilities = torch.log_softmax(logits if bias is None else logits + bias, dim=1)
            total = torch.logaddexp(total, torch.logsumexp(log_probabilities, dim=0))
        return total, rows.shape[0]

    @torch.no_grad()
    def accumulate_(self, log_sum: Tensor, rows: int) -> None:
        """Add one micro-batch: log sum_b softmax_k (K,) over `rows` rows. The centre changes at `commit_` only."""
        self._check_columns("log_sum", log_sum)
        self._log_sum = log_sum if self._log_sum is None else torch.logaddexp(self._log_sum, log_sum)
        self._rows += rows

    @torch.no_grad()
    def commit_(self) -> None:
        """One EMA step from all that was accumulated, over all ranks. Every rank must call it, also one without
        rows."""
        self._check_converted()
        log_sum = torch.full_like(self.log_center, -torch.inf) if self._log_sum is None else self._log_sum
        # Probabilities are summed before the logarithm: a mean of the ranks' logarithms is another number.
        count = log_sum.new_full((1,), self._rows, dtype=torch.float64)
        total = all_reduce_sum_(torch.cat([log_sum.double().exp(), count]), self.process_group)
        mean = (total[:-1] / total[-1]).log().clamp(min=_FLOOR).to(self.log_center.dtype)
        updated = self.momentum * self.log_center + (1 - self.momentum) * mean
        # torch.where instead of a branch: whether any rank had rows is known on the device only.
        self.log_center.copy_(torch.where(total[-1] > 0, updated, self.log_center))
        self._log_sum, self._rows = None, 0

    @torch.no_grad()
    def convert_logit_center_(self, temperature: float) -> None:
        """Turn a loaded DINO centre (in units of scores) into `log_center` = center / temperature; otherwise do
        nothing.

        `temperature` is the teacher's at this moment of training. The losses in `compat` call this themselves.
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
