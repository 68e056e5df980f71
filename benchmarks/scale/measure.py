"""The model beside real steps: what collectives were called with and bytes of tensors, on ranks that talk over gloo."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.loss.memory import peak
from benchmarks.scale.model import GATHERED, REPLICATED, Cost, Setting
from vmf_heads import _memory
from vmf_heads.compat.dino import DINOHead, DINOLoss
from vmf_heads.parallel import shard_prototypes

SECONDS = 1800  # after which a rank that waits for another gives up
WIDTH = 8  # of the backbone's features and of the MLP: next to nothing


class Traffic(TorchDispatchMode):
    """Adds up the bytes that this rank sends in collectives, those of a ring."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = 0.0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            self.sent += _sent(function.__name__.split(".")[0].strip("_"), args)
        return function(*args, **(kwargs or {}))


def _sent(name: str, args: Any) -> float:
    if name == "allreduce":
        (tensor,), group = args[0], dist.ProcessGroup.unbox(args[1])
        return 2 * (group.size() - 1) / group.size() * _bytes(tensor)
    if name == "allgather_base":
        return _bytes(args[0]) - _bytes(args[1])
    if name == "reduce_scatter_base":
        return _bytes(args[1]) - _bytes(args[0])
    raise ValueError(f"what a rank sends in the collective {name!r} is not known here, so its bytes cannot be counted")


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class Step:
    """Student, teacher, loss, AdamW and EMA in one of the layouts.

    `shards` is REPLICATED, GATHERED, or into how many parts the prototypes are cut.
    """

    def __init__(self, setting: Setting, shards: int, crops: int) -> None:
        torch.manual_seed(0)
        self.shards = shards
        self.student, self.teacher = (
            nn.Sequential(DINOHead(WIDTH, setting.prototypes, nlayers=1, bottleneck_dim=setting.dim)) for _ in range(2)
        )
        self.teacher.requires_grad_(False)
        self.loss = DINOLoss(setting.prototypes, crops, 0.04, 0.04, 0, 1, fused=True)
        for model in (self.student, self.teacher):
            if shards > 0:
                copies = setting.ranks // shards
                shape = (shards,) if copies == 1 else (copies, shards)
                shard_prototypes(model, init_device_mesh("cpu", shape))
            if shards == GATHERED:
                fully_shard(model[0])
                fully_shard(model, reshard_after_forward=True)
        self.wrapped = self.student
        if shards != GATHERED:
            self.wrapped = DistributedDataParallel(self.student, gradient_as_bucket_view=True)
        self.loss.attach(self.wrapped, self.teacher)
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=1e-4, foreach=False)
        self.views = torch.randn(setting.student_rows, WIDTH)
        self.teacher_rows = setting.teacher_rows

    def learn(self) -> None:
        """Forward, loss and backward; the optimiser has dropped the gradients before."""
        self.loss(self.wrapped(self.views), self.teacher(self.views[: self.teacher_rows]), 0).backward()

    def update(self) -> None:
        """AdamW and EMA."""
        self.optimizer.step()
        with torch.no_grad():
            for ours, theirs in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                _local(ours).lerp_(_local(theirs), 0.01)

    def held(self) -> int:
        """Bytes of the storages of parameters, gradients if there are, moments and teacher, whatever part is used."""
        student = list(self.student.parameters())
        tensors = [*student, *self.teacher.parameters(), *(p.grad for p in student if p.grad is not None)]
        tensors += [x for state in self.optimizer.state.values() for x in state.values() if x.dim()]
        storages = {s.data_ptr(): s.nbytes() for s in (_local(x).untyped_storage() for x in tensors)}
        return sum(storages.values())


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def measure(setting: Setting, shards: Sequence[int], crops: int) -> list[Cost]:
    """What rank 0 of `setting.ranks` really sends, holds and takes, for each of these numbers of shards."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (setting, shards, crops, folder), nprocs=setting.ranks)
        return [Cost(**found) for found in torch.load(Path(folder, "0.pt"))]


def _rank(rank: int, setting: Setting, shards: Sequence[int], crops: int, folder: str) -> None:
    torch.set_num_threads(1)
    rendezvous = Path(folder, "rendezvous").as_uri()
    dist.init_process_group("gloo", rendezvous, timedelta(seconds=SECONDS), world_size=setting.ranks, rank=rank)
    # As small beside these prototypes as they are, untouched, beside those of a large head.
    _memory.CHUNK_BYTES["cpu"], _memory.CACHE_BYTES = setting.chunk_bytes, setting.chunk_bytes // 8
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")
    torch.save([_cost(Step(setting, number, crops)) for number in shards], Path(folder, f"{rank}.pt"))
    dist.barrier()
    os._exit(0)  # gloo's threads may abort a process that finalises Python while they end


def _cost(step: Step) -> dict[str, float]:
    for _ in range(2):  # the optimiser's state, and DistributedDataParallel's final buckets
        step.learn()
        step.update()
        step.optimizer.zero_grad()
    with Traffic() as traffic:
        step.learn()
    step.update()
    held = step.held()
    step.optimizer.zero_grad()
    left = held if step.shards == REPLICATED else step.held()  # DistributedDataParallel's buckets stay
    return {"sent": traffic.sent, "held": held, "peak": left + peak(step.learn, "cpu")}
