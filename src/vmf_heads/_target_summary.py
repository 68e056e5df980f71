"""Three numbers about a teacher's targets that a training log wants, also where no rank has all of a row's targets."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ._matmul import at_least_float32, linear_float32
from ._shards import RowExchange, Shards, exchanges, shards_of
from .centering import teacher_targets
from .prototypes import HeadOutput, local_prototypes


class TargetSummary(NamedTuple):
    """What N targets (N, K) are like, as scalar tensors.

    Attributes:
        entropy: their mean entropy in nats; ln K where all are uniform.
        marginal_entropy: the entropy of their mean; `entropy` where all are the same.
        used: how many prototypes are the most probable one of some target.
    """

    entropy: Tensor
    marginal_entropy: Tensor
    used: Tensor

    @classmethod
    def of(cls, targets: Tensor) -> TargetSummary:
        """That of targets (..., K) which are at hand."""
        rows = targets.flatten(0, -2)
        return cls(_entropies(rows).mean(), _entropies(rows.mean(dim=0)), _used(rows))


def summarize_targets(
    teacher: Tensor | HeadOutput, temperature: float, log_normalizer: Tensor, log_center: Tensor, *, exact: bool
) -> TargetSummary:
    """The summary of Eq. 7 for raw scores (..., K), or for features and prototypes, of which N rows are held at once.

    Where prototypes are cut over ranks, each rank gets the summary of its own rows, and every rank must call.
    """
    if isinstance(teacher, HeadOutput):
        shards = shards_of(teacher.directions, "teacher.directions")
        if shards is not None:
            return _of_parts(teacher, shards, temperature, log_normalizer - log_center, exact=exact)
        teacher = teacher.scores(exact=exact)
    targets = teacher_targets(teacher, temperature, log_normalizer=log_normalizer, log_center=log_center)
    return TargetSummary.of(targets)


def _of_parts(teacher: HeadOutput, shards: Shards, temperature: float, offset: Tensor, *, exact: bool) -> TargetSummary:
    rows = teacher.features.flatten(0, -2)
    (exchange,) = exchanges(shards, rows)
    assert isinstance(exchange, RowExchange)
    scores = linear_float32(exchange.gather(rows), local_prototypes(teacher).prototypes, exact=exact)
    logits = at_least_float32(scores) / temperature + offset[shards.columns]
    targets = exchange.log_softmax(logits).exp()
    largest = targets.amax(dim=1)
    of_all = largest.clone()
    dist.all_reduce(of_all, op=dist.ReduceOp.MAX, group=shards.group)
    # A sum over this rank's prototypes for the rows of each rank; together they are sums over all prototypes.
    parts = []
    for block, here in zip(targets.split(exchange.counts), (largest == of_all).split(exchange.counts), strict=True):
        entropies = (_entropies(block).mean(), _entropies(block.mean(dim=0)), _used(block[here]))
        parts.append(torch.stack([x.double() for x in entropies]))
    total = torch.stack(parts)
    dist.all_reduce(total, group=shards.group)
    entropy, marginal_entropy, used = total[shards.rank].to(targets.dtype)
    return TargetSummary(entropy, marginal_entropy, used)


def _entropies(probabilities: Tensor) -> Tensor:
    return torch.special.entr(probabilities).sum(dim=-1)


def _used(targets: Tensor) -> Tensor:
    """How many columns of targets (N, K) hold the largest number of some row."""
    return targets.new_zeros(targets.shape[1]).scatter_(0, targets.argmax(dim=1), 1).sum()
