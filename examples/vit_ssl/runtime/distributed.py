"""The processes that torchrun starts: who am I, on which device, and how many of us are there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist

Result = TypeVar("Result")


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Join the processes of torchrun, over NCCL on GPUs and over gloo otherwise; alone, do nothing."""
    if "RANK" not in os.environ or dist.is_initialized():  # started without torchrun, or called inside another block
        yield
        return
    where = device()
    if where.type == "cuda":
        torch.cuda.set_device(where)
    # A backend per kind of device: what is gathered on the CPU (results, checkpoints) needs gloo beside NCCL.
    dist.init_process_group("cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def device() -> torch.device:
    """Return the GPU of this process, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def rank() -> int:
    """Return the number of this process, 0 to `world_size() - 1`."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return how many processes work together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Return whether this is the process that prints and writes files."""
    return rank() == 0


def group_of_one() -> dist.ProcessGroup | None:
    """Return a group of this process alone, for work that each does on the same rows; None without others.

    All processes must call it.
    """
    return dist.new_subgroups(group_size=1)[0] if world_size() > 1 else None


def gather_rows(values: torch.Tensor) -> torch.Tensor:
    """Return the vectors (n,) of all processes as rows (world_size, n), on each of them."""
    if not dist.is_initialized():
        return values.unsqueeze(0)
    rows = [torch.empty_like(values) for _ in range(world_size())]
    dist.all_gather(rows, values)
    return torch.stack(rows)


def on_main(work: Callable[[], Result]) -> Result:
    """Return on every process what `work` returns on the main one; raise its error on all of them, too."""
    if not dist.is_initialized():
        return work()
    outcome: list[Any] = [None, None]
    if is_main():
        try:
            outcome[0] = work()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def barrier() -> None:
    """Wait until every process is here."""
    if dist.is_initialized():
        dist.barrier()
