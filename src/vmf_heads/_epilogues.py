"""The elementwise work between the products of `prototype_cross_entropy`: from products to probabilities.

Plain operations that need no memory but the given buffers; `compiled` makes a few kernels of each function.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor


class Epilogues(NamedTuple):
    """The four functions below, plain or compiled."""

    predictions_: Callable[[Tensor, Tensor | None, Tensor | None], tuple[Tensor, Tensor]]
    statistics_: Callable[[Tensor, Tensor | None, Tensor | None, Tensor], tuple[Tensor, Tensor]]
    targets_: Callable[[Tensor, Tensor | None, Tensor], Tensor]
    differences_: Callable[[Tensor, Tensor | None, Tensor | None, Tensor, Tensor], tuple[Tensor, Tensor]]


def predictions_(products: Tensor, factor: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """(softmax, logsumexp) of the logits products * factor + bias: (c, K), which overwrites `products`, and (c, 1)."""
    logits = affine_(products, factor, bias)
    largest = logits.amax(dim=1, keepdim=True)
    p = logits.sub_(largest).exp_()  # by hand, because a softmax would need memory of its own
    total = p.sum(dim=1, keepdim=True)
    return p.div_(total), largest + total.log()


def statistics_(products: Tensor, factor: Tensor | None, bias: Tensor | None, scratch: Tensor) -> tuple[Tensor, Tensor]:
    """(logits, log_sum): (c, K), which overwrite `products`, and the log of their summed probabilities (K,)."""
    logits = affine_(products, factor, bias)
    log_p = torch.log_softmax(logits, dim=1, out=scratch)
    largest = log_p.amax(dim=0)  # a sum of probabilities would underflow where no row of the chunk chooses k
    return logits, log_p.sub_(largest).exp_().sum(dim=0).log_().add_(largest)


def targets_(logits: Tensor, bias: Tensor | None, result: Tensor) -> Tensor:
    """softmax(logits + bias) (c, K) in `result`; may overwrite `logits`."""
    if bias is not None:
        # Compiled, the sum is no tensor of its own (and torch 2.13's C++ generator fails on one that is written back).
        logits = logits + bias if torch.compiler.is_compiling() else logits.add_(bias)
    return torch.softmax(logits, dim=1, out=result)


def differences_(
    products: Tensor, factor: Tensor | None, bias: Tensor | None, targets: Tensor, result: Tensor
) -> tuple[Tensor, Tensor]:
    """(softmax - targets, cross-entropy towards the targets) of the logits: (c, K) in `result` and (c,)."""
    logits = affine_(products, factor, bias)
    log_p = torch.log_softmax(logits, dim=1, out=result)
    cross_entropy = torch.mul(targets, log_p, out=logits).sum(dim=1).neg_()
    return log_p.exp_().sub_(targets), cross_entropy


def affine_(products: Tensor, factor: Tensor | None, bias: Tensor | None) -> Tensor:
    """products * factor + bias, in place and in one pass."""
    if factor is None:
        return products if bias is None else products.add_(bias)
    return products.mul_(factor) if bias is None else torch.addcmul(bias, products, factor, out=products)


PLAIN = Epilogues(predictions_, statistics_, targets_, differences_)


@cache
def compiled() -> Epilogues:
    """Each through torch.compile, for any number of rows."""
    return Epilogues(*(torch.compile(function, dynamic=True) for function in PLAIN))  # type: ignore[arg-type]
