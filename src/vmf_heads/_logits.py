"""Logits of a chunk of rows: their memory, and the elementwise work between the products, in no memory but theirs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import _memory
from ._weight_normed import WeightNormed

_FILLING = 32
"""So many rows, or a multiple, leave no remainder in a loop over their numbers for one prototype."""

_SUMMED_AT_ONCE, _MULTIPLIED_AT_ONCE = 2048, 256

Groups = Sequence[tuple[slice, slice]]


class LogitsMemory:
    """Memory for the logits of every chunk in turn: on the CPU fresh pages cost as much as a softmax.

    A CPU holds the logits of a prototype side by side, (K, rows) in memory. MKL makes them faster than as (rows, K),
    and the other products are as fast. torch.compile cannot trace such results.
    """

    def __init__(self, rows: int, v: Tensor) -> None:
        self._transposed = v.device.type == "cpu" and not torch.compiler.is_compiling()
        self._prototypes = len(v)
        self._memory = torch.empty(rows * len(v), dtype=v.dtype, device=v.device)

    def take(self, *rows: int) -> list[Tensor]:
        """Tensors (rows, K) of so many rows, beside each other; those of the last call are overwritten."""
        k = self._prototypes
        parts = self._memory[: sum(rows) * k].split([n * k for n in rows])
        if self._transposed:
            return [part.view(k, n).t() for part, n in zip(parts, rows, strict=True)]
        return [part.view(n, k) for part, n in zip(parts, rows, strict=True)]


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


def meet_at_same_place_(logits: Tensor, largest: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The sums (c,) of exp(logits - largest), which overwrites the logits (c, K), and <targets, logits - largest> (c,).

    Row i of the targets (c, K) is that of row i of the logits.
    """
    mean_logit, divisor = torch.zeros_like(largest), torch.zeros_like(largest)
    for block in _blocks(logits):
        # Less the largest before they meet the targets: or rounding would take the small losses of confident rows.
        part = logits[:, block].sub_(largest[:, None])
        mean_logit += (targets[:, block] * part).sum(dim=1)
        divisor += part.exp_().sum(dim=1)
    return divisor, mean_logit


def meet_in_groups_(
    logits: Tensor, largest: Tensor, targets: Tensor, pair_weight: Tensor, groups: Groups
) -> tuple[Tensor, Tensor]:
    """As `meet_at_same_place_`, where <targets, .> is the sum over targets j (n, K) with the weights pair_weight_ij.

    These (c, n) are 0 but for the `groups`, pairs of slices of c and of n, which follow each other in c.
    """
    meetings = [logits.new_zeros(len(logits[rows]), len(targets[others])) for rows, others in groups]
    divisor = torch.zeros_like(largest)
    for block in _blocks(logits):
        part = logits[:, block].sub_(largest[:, None])
        for meeting, (rows, others) in zip(meetings, groups, strict=True):
            meeting += _product_in_parts(part[rows], targets[others, block])
        divisor += part.exp_().sum(dim=1)
    pairs = zip(meetings, groups, strict=True)
    return divisor, torch.cat([(meeting * pair_weight[rows, others]).sum(dim=1) for meeting, (rows, others) in pairs])


def subtract_at_same_place_(
    p: Tensor, p_factor: Tensor, targets: Tensor, target_factor: Tensor, column_sums: Tensor | None, weight: Tensor
) -> None:
    """p (c, K) becomes p_factor * p - target_factor * targets, factors (c,), and weight @ p is added to column_sums."""
    for block in _blocks(p):
        part = p[:, block].mul_(p_factor[:, None]).addcmul_(targets[:, block], target_factor[:, None], value=-1)
        if column_sums is not None:
            column_sums[block].addmv_(part.t(), weight)


def subtract_in_groups_(
    p: Tensor, p_factor: Tensor, targets: Tensor, pair_weight: Tensor, groups: Groups, column_sums: Tensor | None
) -> None:
    """p (c, K) becomes p_factor (c,) * p - pair_weight @ targets, and its sums over c are added to `column_sums`."""
    for block in _blocks(p):
        part = p[:, block].mul_(p_factor[:, None])
        for rows, others in groups:
            part[rows].addmm_(pair_weight[rows, others], targets[others, block], alpha=-1)
        if column_sums is not None:
            column_sums[block] += part.sum(dim=0)


def _product_in_parts(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.T of a (m, K) and b (n, K), which adds up few of the K products at a time.

    A small product of matrices adds up one by one, and where the sum has grown, small numbers are lost.
    """
    whole = a.shape[1] // _MULTIPLIED_AT_ONCE * _MULTIPLIED_AT_ONCE
    left, right = (x[:, :whole].unflatten(1, (-1, _MULTIPLIED_AT_ONCE)) for x in (a, b))
    result = torch.bmm(left.transpose(0, 1), right.permute(1, 2, 0)).sum(dim=0)
    return result if whole == a.shape[1] else result.addmm_(a[:, whole:], b[:, whole:].t())


def _blocks(logits: Tensor) -> list[slice]:
    """Slices of the prototypes of (c, K), which lie beside each other in memory and fit into a cache together.

    What is done to the logits, several passes, is done to one of them after the other. All of them are one where the
    logits of a row lie side by side.
    """
    rows, k = logits.shape
    if logits.is_contiguous():
        return [slice(0, k)]
    size = _memory.CACHE_BYTES // (4 * rows)
    size = max(size // _MULTIPLIED_AT_ONCE, 1) * _MULTIPLIED_AT_ONCE  # which leaves a remainder in the last one only
    return [slice(start, min(start + size, k)) for start in range(0, k, size)]


def _affine_(products: Tensor, factor: Tensor | None, bias: Tensor | None) -> Tensor:
    """products * factor + bias, in place."""
    if factor is None:
        return products if bias is None else products.add_(bias)
    if bias is None:
        return products.mul_(factor)
    if products.is_contiguous():
        return torch.addcmul(bias, products, factor, out=products)
    # Along (K, rows) in memory addcmul takes longer than two passes over a block that is in a cache.
    return products.mul_(factor).add_(bias)
