"""Logits of a chunk of rows: their memory, and the elementwise work between the products, in no memory but theirs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import _memory
from ._shards import Exchange
from ._weight_normed import WeightNormed

_FILLING = 32
"""So many rows, or a multiple, leave no remainder in a loop over their numbers for one prototype."""

_SUMMED_AT_ONCE = 2048


class LogitsMemory:
    """Memory for the logits of every chunk in turn: on the CPU fresh pages cost as much as a softmax.

    A CPU holds the logits of a prototype side by side, (K, rows) in memory. MKL makes them faster than as (rows, K),
    and the other products are as fast. torch.compile cannot trace such results.
    """

    def __init__(self, rows: int, v: Tensor) -> None:
        self._transposed = v.device.type == "cpu" and not torch.compiler.is_compiling()
        self._prototypes = len(v)
        self._memory = torch.empty(rows * len(v), dtype=v.dtype, device=v.device)

    def take(self, rows: int, buffers: int = 1) -> list[Tensor]:
        """So many tensors (rows, K), beside each other; those of the last call are overwritten."""
        k = self._prototypes
        memory = self._memory[: buffers * rows * k]
        if self._transposed:
            return [part.t() for part in memory.view(buffers, k, rows)]
        return list(memory.view(buffers, rows, k))


def chunks_of(n: int, rows: int) -> list[slice]:
    """As few slices of `n` rows as there must be with at most `rows` each (or 1), all but the last equally long.

    Where it makes no more of them, their length is a multiple of what fills the registers of any CPU.
    """
    size = math.ceil(n / math.ceil(n / max(rows, 1))) if n else 1
    if (filling := math.ceil(size / _FILLING) * _FILLING) <= rows:
        size = filling
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def most_rows(chunks: list[slice]) -> int:
    return chunks[0].stop if chunks else 0


def predictions_(w: WeightNormed, y: Tensor, bias: Tensor | None, buffer: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(p, divisor, logsumexp) of the logits <y, w> + bias of rows y (c, p), whose softmax is p / divisor.

    p (c, K) in [0, 1] is in `buffer`, the others are (c,). A softmax would need memory of its own.
    """
    logits, largest = logits_(w, y, bias, buffer)
    divisor = exponentials_(logits, largest)
    return logits, divisor, largest + divisor.log()


def logits_(w: WeightNormed, y: Tensor, bias: Tensor | None, buffer: Tensor) -> tuple[Tensor, Tensor]:
    """<y, w> + bias (c, K) in `buffer`, or in new memory in half precision, and the largest number of each row (c,)."""
    largest = None
    blocks = _blocks(buffer) if w.dtype is None else [slice(0, len(w.v))]
    for block in blocks:
        factor = None if w.late_factor is None else w.late_factor[block]
        logits = _affine_(w.products(y, buffer[:, block], block), factor, None if bias is None else bias[block])
        of_block = logits.amax(dim=1)
        largest = of_block if largest is None else torch.maximum(largest, of_block)
    assert largest is not None
    return logits if len(blocks) == 1 else buffer, largest


def exponentials_(logits: Tensor, largest: Tensor) -> Tensor:
    """The sums (c,) of exp(logits - largest), which overwrites the logits (c, K)."""
    sums = [logits[:, block].sub_(largest[:, None]).exp_().sum(dim=1) for block in _blocks(logits)]
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum(dim=0)


def log_softmax(logits: Tensor, largest: Tensor, result: Tensor) -> Tensor:
    """The log-probabilities (c, K), in `result`, of logits whose rows have these largest numbers."""
    if logits.is_contiguous():
        return torch.log_softmax(logits, dim=1, out=result)
    log_sum = torch.sub(logits, largest[:, None], out=result).exp_().sum(dim=1).log_()
    return torch.sub(logits, log_sum.add_(largest)[:, None], out=result)


def log_sum_(log_p: Tensor) -> Tensor:
    """The log of the summed probabilities (K,) of log-probabilities (c, K), which are overwritten."""
    largest = log_p.amax(dim=0)  # a sum of probabilities would underflow where no row of the chunk chooses k
    return log_p.sub_(largest).exp_().sum(dim=0).log_().add_(largest)


def log_sum_of_predictions(p: Tensor, bias: Tensor | None) -> Tensor | None:
    """log sum_b softmax(s_b) (K,) of logits s (c, K), from p = exp(s + bias - one number of each row).

    softmax(s_b)_k = p_bk exp(-bias_k) / sum_j p_bj exp(-bias_j), which takes no exponential of c x K numbers again.
    What was too small for p's dtype is missing; None where that may be more than a rounding error of the result.
    """
    log_weights = p.new_zeros(p.shape[1]) if bias is None else bias.amin() - bias
    weights = log_weights.exp()
    # A product with a vector adds up one by one, and loses digits over many prototypes.
    parts = zip(p.split(_SUMMED_AT_ONCE, dim=1), weights.split(_SUMMED_AT_ONCE), strict=True)
    row_sums = torch.stack([part @ weight for part, weight in parts]).sum(dim=0)
    inverse = row_sums.reciprocal()
    sums = inverse @ p
    number = torch.finfo(p.dtype)
    lost = number.tiny / number.eps  # of p, and of its products with weights <= 1
    if not (row_sums.amin() > lost * p.shape[1] and sums.amin() > lost * inverse.sum()):
        return None
    return sums.log_().add_(log_weights)


def differences_(
    w: WeightNormed,
    y: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    mass: Tensor | None,
    buffers: Sequence[Tensor],
    exchange: Exchange,
) -> tuple[Tensor, Tensor]:
    """(targets - softmax, cross-entropy towards the targets) of the logits <y, w> + bias of rows y (c, p).

    The former (c, K) overwrites `targets`, the latter is (c,). `mass` (c,) is the sum of a row of targets, where that
    is not 1; the cross-entropy is this rank's part of it.
    """
    logits, largest = logits_(w, y, bias, buffers[0])
    mean_logit, divisor = torch.zeros_like(largest), torch.zeros_like(largest)
    for block in _blocks(logits):
        # Less the largest before they meet the targets: or rounding would take the small losses of confident rows.
        part = logits[:, block].sub_(largest[:, None])
        mean_logit += torch.mul(targets[:, block], part, out=buffers[1][:, : part.shape[1]]).sum(dim=1)
        divisor += part.exp_().sum(dim=1)
    log_sum, inverse = divisor.log(), divisor.reciprocal()
    if exchange.ranks > 1:
        whole = exchange.logsumexp(largest + log_sum) - largest
        inverse, log_sum = (-whole).exp(), whole if mass is None else whole * mass
    return targets.addcmul_(logits, inverse[:, None], value=-1), log_sum - mean_logit


def _blocks(logits: Tensor) -> list[slice]:
    """Slices of the prototypes of (c, K), which lie beside each other in memory and fit into a cache together.

    What is done to the logits, several passes, is done to one of them after the other. All of them are one where the
    logits of a row lie side by side.
    """
    rows, k = logits.shape
    if logits.is_contiguous():
        return [slice(0, k)]
    size = max(1, _memory.CACHE_BYTES // (4 * rows))
    return [slice(start, min(start + size, k)) for start in range(0, k, size)]


def _affine_(products: Tensor, factor: Tensor | None, bias: Tensor | None) -> Tensor:
    """products * factor + bias, in place and in one pass."""
    if factor is None:
        return products if bias is None else products.add_(bias)
    return products.mul_(factor) if bias is None else torch.addcmul(bias, products, factor, out=products)
