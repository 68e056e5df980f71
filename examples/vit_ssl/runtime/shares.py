"""Work that the ranks divide among themselves, item by item."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch.distributed as dist

from runtime.distributed import rank, world_size

Item = TypeVar("Item")


def share(items: Sequence[Item]) -> Sequence[Item]:
    """Return this rank's items: every `world_size()`-th one."""
    return items[rank() :: world_size()]


def gather(results: list[Item]) -> list[Item]:
    """Return the results of all items in their order, on every rank, from those of each rank's `share`."""
    if world_size() == 1:
        return results
    parts: list[list[Item]] = [[] for _ in range(world_size())]
    dist.all_gather_object(parts, results)
    return [parts[index % world_size()][index // world_size()] for index in range(sum(map(len, parts)))]
