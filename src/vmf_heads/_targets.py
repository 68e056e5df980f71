"""The teacher's probabilities of Eq. 7, a chunk of rows at a time, and on the way its rows' statistics of Eq. 9."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ._compiled import has_values
from ._logits import (
    LogitsMemory,
    chunks_of,
    exponentials_,
    log_softmax,
    log_sum_,
    log_sum_of_predictions,
    logits_,
    predictions_,
)
from ._shards import Exchange
from ._weight_normed import WeightNormed


class Targets:
    """Targets and `log_sum` (K,), the statistics of all chunks that were asked for.

    On a CPU the statistics are sums of the targets' own exponentials, until those turn out to have lost some of them to
    underflow. Then, and everywhere else, they are made from logits, in a second (c, K) buffer: a GPU's host would have
    to wait for the answer, and ranks to agree on it.
    """

    def __init__(
        self,
        prototypes: WeightNormed,
        temperature: float,
        statistics_bias: Tensor | None,
        target_bias: Tensor | None,
        exchange: Exchange,
        chunk_rows: int,
    ) -> None:
        self._prototypes, self._temperature = prototypes, temperature
        self._statistics_bias, self._target_bias = statistics_bias, target_bias
        self._exchange, self._chunk_rows = exchange, chunk_rows
        v = prototypes.v
        self._from_exponentials = exchange.ranks == 1 and v.device.type == "cpu" and has_values(v)
        self.log_sum = v.new_full((len(v),), -torch.inf)

    def rows_of_memory(self, n: int) -> int:
        """How many rows of logits `chunks` of n rows may hold."""
        return min(2 * n, max(self._chunk_rows, 2))

    def chunks(self, z: Tensor, memory: LogitsMemory) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(chunk, p, factor) until all rows of z (Nt, p) are done: a chunk's targets are p (c, K) times factor (c,)."""
        start = 0
        while start < len(z):
            buffers = 1 if self._from_exponentials else 2
            rows = chunks_of(len(z) - start, self._chunk_rows // buffers)[0].stop
            made = self._try(z[start : start + rows], *memory.take(*buffers * [rows]))
            if made is not None:
                p, divisor, share = made
                yield slice(start, start + rows), p, over(share, divisor)
                start += rows

    def make(self, z: Tensor, result: Tensor, scratch: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(p, divisor, share) of rows z (c, p): their targets are p (c, K), in `result`, times share / divisor (c,).

        The share is this rank's of the sum of a row, None if that is all of it.
        """
        made = self._try(z, result, scratch)
        while made is None:
            made = self._try(z, result, scratch)
        return made

    def _try(
        self, z: Tensor, result: Tensor, scratch: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """As `make`, but None, and nothing done, once, if the exponentials do not hold the statistics."""
        z = z / self._temperature
        if self._from_exponentials:
            p, divisor, _ = predictions_(self._prototypes, z, _sum(self._statistics_bias, self._target_bias), result)
            log_sum = log_sum_of_predictions(p, self._target_bias)
            if log_sum is None:
                self._from_exponentials = False
                return None
            self.log_sum = torch.logaddexp(self.log_sum, log_sum)
            return p, divisor, None
        assert scratch is not None
        logits, largest = logits_(self._prototypes, z, self._statistics_bias, result)
        log_p = log_softmax(logits, largest, scratch)
        part = largest - log_p.amax(dim=1) if self._exchange.ranks > 1 else None  # the logsumexp of the statistics
        if self._target_bias is not None:
            # Under torch.compile not in place: torch 2.13 generates wrong C++ for that, and it fuses anyway.
            compiling = torch.compiler.is_compiling()
            logits = logits + self._target_bias if compiling else logits.add_(self._target_bias)
            largest = logits.amax(dim=1)
        divisor = exponentials_(logits, largest)
        share = None
        if part is not None:
            parts = torch.stack([part, largest + divisor.log()])
            shares = parts - self._exchange.logsumexp(parts)
            log_p.add_(shares[0][:, None])
            share = shares[1].exp()
        self.log_sum = torch.logaddexp(self.log_sum, log_sum_(log_p))
        return logits, divisor, share


def over(share: Tensor | None, divisor: Tensor) -> Tensor:
    """share / divisor (c,), where None stands for 1."""
    return divisor.reciprocal() if share is None else share / divisor


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """a + b, where None stands for 0."""
    if a is None or b is None:
        return b if a is None else a
    return a + b
