"""The one collective the library uses, and the one question it asks of a sharded model."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def all_reduce_sum_(tensor: Tensor, process_group: dist.ProcessGroup | None = None) -> Tensor:
    """Sum `tensor` over the ranks of `process_group` (None: all), in place; without torch.distributed nothing
    happens."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor, group=process_group)
    return tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether `tensor` is a DTensor, as FSDP2 makes of parameters, or a part of FSDP1's flat ones.

    By attribute: the import path of DTensor moved between torch versions.
    """
    return hasattr(tensor, "placements") or hasattr(tensor, "_fsdp_flattened")
