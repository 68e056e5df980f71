"""Logits of a chunk of rows: their memory, and the elementwise work between the products, in no memory but theirs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._shards import Exchange

_FILLING = 32
"""So many rows, or a multiple, leave no remainder in a loop over their numbers for one prototype."""


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


def predictions_(products: Tensor, factor: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(p, divisor, logsumexp) of the logits products * factor + bias, whose softmax is p / divisor.

    p (c, K) in [0, 1] overwrites `products`, the others are (c,). A softmax would need memory of its own.
    """
    logits = _affine_(products, factor, bias)
    largest = logits.amax(dim=1, keepdim=True)
    p = logits.sub_(largest).exp_()
    divisor = p.sum(dim=1)
    return p, divisor, largest.squeeze(1) + divisor.log()


def log_softmax_(products: Tensor, factor: Tensor | None, bias: Tensor | None, result: Tensor) -> tuple[Tensor, Tensor]:
    """(logits, log-probabilities) (c, K): the former overwrite `products`, the latter are in `result`."""
    logits = _affine_(products, factor, bias)
    if logits.is_contiguous():
        return logits, torch.log_softmax(logits, dim=1, out=result)
    largest = logits.amax(dim=1, keepdim=True)
    log_sum = torch.sub(logits, largest, out=result).exp_().sum(dim=1, keepdim=True).log_()
    return logits, torch.sub(logits, log_sum.add_(largest), out=result)


def log_sum_(log_p: Tensor) -> Tensor:
    """The log of the summed probabilities (K,) of log-probabilities (c, K), which are overwritten."""
    largest = log_p.amax(dim=0)  # a sum of probabilities would underflow where no row of the chunk chooses k
    return log_p.sub_(largest).exp_().sum(dim=0).log_().add_(largest)


def targets_(logits: Tensor, bias: Tensor | None, result: Tensor) -> Tensor:
    """softmax(logits + bias) (c, K) in `result`; may overwrite `logits`."""
    if bias is not None:
        # Under torch.compile the addition is not in place: torch 2.13 generates wrong C++ for it, and it fuses anyway.
        logits = logits + bias if torch.compiler.is_compiling() else logits.add_(bias)
    if logits.is_contiguous():
        return torch.softmax(logits, dim=1, out=result)
    p = torch.sub(logits, logits.amax(dim=1, keepdim=True), out=result).exp_()
    return p.div_(p.sum(dim=1, keepdim=True))


def differences_(
    products: Tensor, factor: Tensor | None, bias: Tensor | None, targets: Tensor, result: Tensor, exchange: Exchange
) -> tuple[Tensor, Tensor]:
    """(softmax - targets, cross-entropy towards the targets) of the logits: (c, K) in `result` and (c,)."""
    logits, log_p = log_softmax_(products, factor, bias, result)
    if exchange.ranks > 1:
        part = logits.amax(dim=1) - log_p.amax(dim=1)  # the logsumexp
        log_p.add_((part - exchange.logsumexp(part))[:, None])
    cross_entropy = torch.mul(targets, log_p, out=logits).sum(dim=1).neg_()
    return log_p.exp_().sub_(targets), cross_entropy


def _affine_(products: Tensor, factor: Tensor | None, bias: Tensor | None) -> Tensor:
    """products * factor + bias, in place and in one pass."""
    if factor is None:
        return products if bias is None else products.add_(bias)
    return products.mul_(factor) if bias is None else torch.addcmul(bias, products, factor, out=products)
