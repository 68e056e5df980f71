"""The one collective the library uses."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def all_reduce_sum_(tensor: Tensor, process_group: dist.ProcessGroup | None = None) -> Tensor:
    """Sum `tensor` over the ranks of `process_group` (None: all), in place; without torch.distributed nothing
    happens."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor, group=process_group)
    return tensor
