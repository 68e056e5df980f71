"""Prototypes of which every rank of a group holds some, and what the ranks tell each other about rows of features.

A softmax over all prototypes, and everything that is a sum over prototypes, comes out of three exchanges: the rows of
all ranks are gathered, so that each rank meets them with its own prototypes; the log-sum-exps of the parts become that
of the whole by a maximum and a sum, one number a row each; sums over prototypes, of one row of p numbers each, are
added up and go back to the rank that the row came from. Nothing with K columns is sent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

# torch 2.13 has new names for these, and warns of the old ones.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)


@dataclass(frozen=True)
class Shards:
    """Which of the K prototypes this rank holds.

    Attributes:
        group: the ranks that together hold all prototypes, each of them once.
        ranks: how many they are.
        rank: the number of this one among them.
        total: K.
    """

    group: dist.ProcessGroup
    ranks: int
    rank: int
    total: int

    @property
    def most(self) -> int:
        """How many prototypes a rank holds, of those that hold the most; the same number on every rank."""
        return math.ceil(self.total / self.ranks)

    def columns_of(self, rank: int) -> slice:
        """Which prototypes are held by that rank of the group: as torch.chunk cuts them."""
        return slice(min(rank * self.most, self.total), min((rank + 1) * self.most, self.total))

    @property
    def columns(self) -> slice:
        """Which prototypes this rank holds."""
        return self.columns_of(self.rank)

    def spread(self, of_columns: Tensor, elsewhere: float) -> Tensor:
        """(K,) with these numbers for this rank's prototypes, and `elsewhere` for those of the others."""
        whole = of_columns.new_full((self.total,), elsewhere)
        whole[self.columns] = of_columns
        return whole

    def check_centre_of(self, process_group: dist.ProcessGroup | None) -> None:
        """Raise ValueError unless the ranks that share a centre hold all that share the prototypes out."""
        if process_group is None:
            return
        shared, needed = (set(dist.get_process_group_ranks(group)) for group in (process_group, self.group))
        if not needed <= shared:
            raise ValueError(
                f"`process_group` (of ranks {sorted(shared)}) must hold all ranks that the prototypes are cut over "
                f"({sorted(needed)}), because each of them has the statistics of its own prototypes only"
            )


def shards_of(tensor: Tensor, name: str) -> Shards | None:
    """How a DTensor with K rows is cut over ranks; None for any other tensor.

    Raises ValueError, which calls the tensor `name`, unless it is cut along its rows, over one dimension of its mesh.
    """
    if not hasattr(tensor, "placements"):
        return None
    placements, mesh = tensor.placements, tensor.device_mesh  # type: ignore[attr-defined]
    cut = [dim for dim, placement in enumerate(placements) if not placement.is_replicate()]
    if len(cut) != 1 or not placements[cut[0]].is_shard(0):
        raise ValueError(
            f"`{name}` (a DTensor placed as {tuple(placements)}) must be cut along its rows over exactly one dimension "
            "of its mesh, and be the same along the others, as vmf_heads.parallel.shard_prototypes leaves it"
        )
    return Shards(mesh.get_group(cut[0]), mesh.size(cut[0]), mesh.get_local_rank(cut[0]), len(tensor))


def place_of(tensor: Tensor) -> tuple[Any, ...]:
    """Where the parts of a DTensor are, mesh and placements; () for any other tensor."""
    return (tensor.device_mesh, tuple(tensor.placements)) if hasattr(tensor, "placements") else ()  # type: ignore[attr-defined]


def local_rows(tensor: Tensor) -> Tensor:
    """The rows of a DTensor that this rank holds, with gradient; any other tensor as it is.

    The gradient is that of the mean over all ranks of the mesh, if what arrives is that of the mean over the ranks that
    share the rows out: it is averaged over those that hold the same rows.
    """
    if not hasattr(tensor, "placements"):
        return tensor
    rows: Tensor = _LocalRows.apply(tensor)
    return rows


class _LocalRows(Function):
    @staticmethod
    def forward(ctx: Any, tensor: Any) -> Tensor:
        ctx.mesh, ctx.placements, ctx.shape, ctx.stride = (
            tensor.device_mesh,
            tensor.placements,
            tensor.shape,
            tensor.stride(),
        )
        rows: Tensor = tensor.to_local().detach()
        return rows

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor

        same = [dim for dim, placement in enumerate(ctx.placements) if placement.is_replicate()]
        copies = math.prod(ctx.mesh.size(dim) for dim in same)
        if copies > 1:
            grad = grad / copies
            for dim in same:
                dist.all_reduce(grad, group=ctx.mesh.get_group(dim))
        return DTensor.from_local(grad, ctx.mesh, ctx.placements, run_check=False, shape=ctx.shape, stride=ctx.stride)


class Alone:
    """The rows of one rank that holds all prototypes: there is nothing to exchange."""

    ranks = 1

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all ranks."""
        return rows

    def own(self, rows: Tensor) -> Tensor:
        """Those of the rows of all ranks that are this one's."""
        return rows

    def sum_own(self, rows: Tensor) -> Tensor:
        """The own ones of the rows (all ranks' rows, ...), summed over the ranks."""
        return rows

    def logsumexp(self, parts: Tensor) -> Tensor:
        """The log-sum-exp over all prototypes, of any shape, from that over this rank's."""
        return parts

    def log_softmax(self, logits: Tensor) -> Tensor:
        """The logarithms of probabilities over all prototypes, of the logits (c, K) of this rank's."""
        return torch.log_softmax(logits, dim=1)

    def checked_equal(self, factor: Tensor) -> Tensor:
        """A number that must be the same on all ranks."""
        return factor


class RowExchange:
    """The rows of the ranks among which the prototypes are shared out; each rank has `counts[rank]` of them.

    All ranks must call every method, in the same order.
    """

    def __init__(self, shards: Shards, counts: Sequence[int]) -> None:
        self.shards, self.ranks, self.counts = shards, shards.ranks, list(counts)
        self._most = max(self.counts)
        self._start = sum(self.counts[: shards.rank])

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all ranks, from the own ones."""
        if self._most == 0:  # no rank has any
            return rows
        missing = self._most - len(rows)
        if missing:
            rows = torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])
        gathered = rows.new_empty(self.ranks * self._most, *rows.shape[1:])
        _all_gather(gathered, rows.contiguous(), group=self.shards.group)
        if min(self.counts) == self._most:
            return gathered
        blocks = gathered.split(self._most)
        return torch.cat([block[:count] for block, count in zip(blocks, self.counts, strict=True)])

    def own(self, rows: Tensor) -> Tensor:
        """Those of the rows of all ranks that are this one's."""
        return rows[self._start : self._start + self.counts[self.shards.rank]]

    def sum_own(self, rows: Tensor) -> Tensor:
        """The own ones of the rows (all ranks' rows, ...), summed over the ranks."""
        if self._most == 0:
            return rows
        if min(self.counts) != self._most:
            padded = rows.new_zeros(self.ranks, self._most, *rows.shape[1:])
            for block, part in zip(padded, rows.split(self.counts), strict=True):
                block[: len(part)] = part
            rows = padded.flatten(0, 1)
        summed = rows.new_empty(self._most, *rows.shape[1:])
        _reduce_scatter(summed, rows.contiguous(), group=self.shards.group)
        return summed[: self.counts[self.shards.rank]]

    def logsumexp(self, parts: Tensor) -> Tensor:
        """The log-sum-exp over all prototypes, of any shape, from that over this rank's."""
        largest = parts.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.shards.group)
        total = (parts - largest).exp_()
        dist.all_reduce(total, group=self.shards.group)
        return total.log_().add_(largest)

    def log_softmax(self, logits: Tensor) -> Tensor:
        """The logarithms of probabilities over all prototypes, of the logits (c, K) of this rank's."""
        return logits - self.logsumexp(logits.logsumexp(dim=1))[:, None]

    def checked_equal(self, factor: Tensor) -> Tensor:
        """What a loss is multiplied by before its backward pass. The prototypes' gradients, which are sums over the
        rows of all ranks, have room for one such number; if ranks differ, a RuntimeError says so. On a GPU, where that
        would make the host wait, the gradients become NaN instead.
        """
        extremes = torch.stack([factor, -factor])
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=self.shards.group)
        differ = extremes[0] != -extremes[1]
        if factor.device.type != "cpu":
            return torch.where(differ, torch.nan, factor)
        if differ:
            raise RuntimeError(
                f"the loss was multiplied by {factor.item():g} before its backward pass, and on another of the ranks "
                f"that share the prototypes out by another number, up to {extremes[0].item():g}: it must be the same "
                "on all of them. What single rows count is what `weights` are for"
            )
        return factor


Exchange = Alone | RowExchange


def exchanges(shards: Shards | None, *rows: Tensor) -> list[Exchange]:
    """One exchange for each of these tensors of rows, whose numbers may differ between ranks; every rank must call.

    The host waits for the device here, once, because a tensor of gathered rows needs a shape.
    """
    if shards is None:
        return [Alone() for _ in rows]
    own = torch.tensor([len(x) for x in rows], device=rows[0].device)
    counts = own.new_empty(shards.ranks, len(rows))
    _all_gather(counts.view(-1), own, group=shards.group)
    return [RowExchange(shards, column) for column in counts.t().tolist()]


def to_own_rows(scores: Tensor, exchange: RowExchange) -> Tensor:
    """(own rows, K) from scores (all ranks' rows, this rank's prototypes). This one does send rows with K columns."""
    shards, own = exchange.shards, exchange.counts[exchange.shards.rank]
    widths = [len(range(*shards.columns_of(rank).indices(shards.total))) for rank in range(shards.ranks)]
    received = scores.new_empty(own * shards.total)
    dist.all_to_all_single(
        received,
        scores.contiguous().view(-1),
        [own * width for width in widths],
        [count * scores.shape[1] for count in exchange.counts],
        group=shards.group,
    )
    parts = received.split([own * width for width in widths])
    return torch.cat([part.view(own, width) for part, width in zip(parts, widths, strict=True)], dim=1)
