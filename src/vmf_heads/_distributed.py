"""Sums over ranks, and parameters that are sharded over them."""

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

    It is recognised by an attribute, because the import path of DTensor differs between versions of torch.
    """
    return hasattr(tensor, "placements") or hasattr(tensor, "_fsdp_flattened")


def cut_like(parameter: Tensor, value: Tensor) -> Tensor:
    """A whole tensor, the same on every rank, as a DTensor that is cut as `parameter` is. Nothing is sent.

    What is a DTensor already, or of another shape, is returned as it is.
    """
    if hasattr(value, "placements") or value.shape != parameter.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    return distribute_tensor(value.to(parameter.device), mesh, placements, src_data_rank=None)


def whole(tensor: Tensor, name: str, rows: int | None = None) -> Tensor:
    """`tensor` with all its `rows` rows; where FSDP2 shards it they are gathered, so every rank must call.

    Raises RuntimeError, which calls the tensor `name`, for the shards of FSDP1, which gathers nothing by itself.
    """
    if hasattr(tensor, "full_tensor"):
        gathered: Tensor = tensor.full_tensor()
        return gathered
    if rows is not None and (tensor.dim() == 0 or len(tensor) != rows):
        raise RuntimeError(
            f"{name} (of shape {tuple(tensor.shape)}) must be whole, with {rows} rows, and here FSDP1 shards it: call "
            "inside FullyShardedDataParallel.summon_full_params, or use FSDP2 (torch.distributed.fsdp.fully_shard)"
        )
    return tensor
