"""What a fit asks of torch.distributed, which need not be there."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .._distributed import all_reduce_sum_


def rank_and_size(process_group: dist.ProcessGroup | None) -> tuple[int, int]:
    """This rank and the number of ranks; (0, 1) without torch.distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(process_group), dist.get_world_size(process_group)
    return 0, 1


def gather_rows(rows: Tensor, slots: int, process_group: dist.ProcessGroup | None) -> Tensor:
    """The rows (n <= slots, columns) of all ranks, those of rank 0 first, without rows that are 0."""
    rank, size = rank_and_size(process_group)
    table = torch.zeros(size, slots, rows.shape[1], dtype=rows.dtype, device=rows.device)
    table[rank, : len(rows)] = rows
    table = all_reduce_sum_(table, process_group).flatten(0, 1)
    return table[(table != 0).any(dim=1)]
