"""How a method's networks share the work: DDP or FSDP2 between processes, compiled and recomputed blocks in each."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from config.options import Strategy
from methods.backbone import blocks
from methods.method import Method
from runtime.distributed import device, world_size
from training.ema import local
from vmf_heads.parallel import prototype_parameters, shard_prototypes


def parallelize(
    method: Method,
    *,
    strategy: Strategy = "ddp",
    prototype_parallel: int = 1,
    bfloat16: bool = False,
    compile_blocks: bool = False,
    activation_checkpointing: bool = False,
) -> None:
    """Prepare `method.student` and `method.teacher`, on their device, for the processes of torchrun; then `attach`.

    None of it changes what is trained: losses and gradients are those of one process, to rounding.

    - "ddp": every process holds both networks; the student's gradients are averaged. One process alone wraps nothing.
    - "fsdp2": parameters, gradients and optimiser state are cut into as many parts as there are processes: each block
      of both backbones, the head and the rest are gathered when they are needed. With `bfloat16` the attention and MLP
      of a block are gathered in bfloat16 and their gradients summed in float32. All else stays float32, as everything
      does under DDP: autocast chooses the dtype of an operation under both, and would round the same operands.
    - `prototype_parallel`: so many processes at a time share the prototypes of both heads out, under either strategy; a
      process holds its part of them, and computes its part of everybody's logits. What is left of `strategy` is for
      everything else. See `vmf_heads.parallel`.
    - `compile_blocks`: torch.compile of every block of both backbones.
    - `activation_checkpointing`: the student's blocks are computed again in the backward pass instead of remembered.

    Raises ValueError for FSDP2 without torchrun, for BatchNorm in several processes without GPUs, for FSDP2 and
    activation checkpointing of a ResNet, for a `prototype_parallel` that does not divide the number of processes or
    whose loss is not fused, and for what keeps prototypes distinct where these are in parts or the loss is not fused.
    """
    _check_distinct_prototypes(method, strategy, prototype_parallel)
    if method.recipe.backbone == "resnet":
        _check_resnet(strategy, activation_checkpointing)
    if strategy == "fsdp2" and not dist.is_initialized():
        raise ValueError("`strategy` (='fsdp2') needs torchrun, for one process too: torchrun --nproc-per-node 1 ...")
    if world_size() > 1:
        _share_batch_statistics(method)
    if prototype_parallel > 1:
        _share_prototypes(method, prototype_parallel)
    if activation_checkpointing:
        method.student.backbone.activation_checkpointing_enable({"use_reentrant": False})
    if compile_blocks:
        for network in (method.student, method.teacher):
            for block in blocks(network.backbone):
                block.compile()
    if strategy == "fsdp2":
        _shard(method.student, bfloat16)
        _shard(method.teacher, bfloat16)
    elif world_size() > 1:
        where = device()
        ids = [where.index] if where.type == "cuda" else None
        method.student = DistributedDataParallel(method.student, ids)


def unwrap(network: nn.Module) -> nn.Module:
    """Return the network that was given to `parallelize`."""
    return network.module if isinstance(network, DistributedDataParallel) else network


@contextlib.contextmanager
def gradients_shared(student: nn.Module, wanted: bool) -> Iterator[None]:
    """Let a forward and backward in this block average the gradients over processes, or only accumulate them."""
    if isinstance(student, DistributedDataParallel):
        with contextlib.nullcontext() if wanted else student.no_sync():
            yield
        return
    if hasattr(student, "set_requires_gradient_sync"):  # FSDP2
        student.set_requires_gradient_sync(wanted)
    yield


def _shard(network: nn.Module, bfloat16: bool) -> None:
    # Imported here, because a run in one process starts sooner without.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device().type, (world_size(),))
    # A linear layer ends in a view, and ViTLayer adds to it out of place, as the warning wants it.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    half = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for block in network.backbone.layers:
        if bfloat16:  # without the LayerNorms, which autocast computes in float32
            fully_shard([block.attention, block.mlp], mesh=mesh, mp_policy=half)
        else:
            fully_shard(block, mesh=mesh)
    ignored = {parameter for parameter in prototype_parameters(network) if local(parameter) is not parameter}
    fully_shard(network.head, mesh=mesh, ignored_params=ignored)
    # Also after a forward, which is all that the teacher does: the EMA averages shards.
    fully_shard(network, mesh=mesh, reshard_after_forward=True, ignored_params=ignored)


def _share_prototypes(method: Method, parts: int) -> None:
    copies, left_over = divmod(world_size(), parts)
    if left_over:
        raise ValueError(
            f"`prototype_parallel` (={parts}) must divide the number of processes (={world_size()}), which torchrun "
            "starts"
        )
    if not method.recipe.fused_loss:
        raise ValueError(f"`prototype_parallel` (={parts}) needs a loss without logits: --set fused_loss=true")
    # Imported here, because a run in one process starts sooner without.
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(device().type, (parts,) if copies == 1 else (copies, parts))
    for network in (method.student, method.teacher):
        shard_prototypes(network, mesh)


def _check_distinct_prototypes(method: Method, strategy: Strategy, prototype_parallel: int) -> None:
    recipe = method.recipe
    wanted = f"`prototype_koleo_weight` (={recipe.prototype_koleo_weight})" if recipe.prototype_koleo_weight else ""
    wanted = "`online_em`" if recipe.online_em is not None else wanted
    if not wanted:
        return
    if prototype_parallel > 1:
        raise ValueError(f"`prototype_parallel` (={prototype_parallel}) must be 1 with {wanted}")
    if recipe.online_em is not None and strategy != "ddp":
        raise ValueError(f"`strategy` (={strategy!r}) must be 'ddp' with `online_em`, which writes whole prototypes")
    if not recipe.fused_loss and (recipe.online_em is not None or strategy != "ddp"):
        raise ValueError(f"{wanted} needs more of the heads than logits: --set fused_loss=true")


def _check_resnet(strategy: Strategy, activation_checkpointing: bool) -> None:
    # Both are for networks that are too large for a device, which these are not. A BatchNorm that is computed again in
    # the backward pass would count a batch twice.
    of_resnet = "with `backbone` (='resnet')"
    if strategy != "ddp":
        raise ValueError(f"`strategy` (={strategy!r}) must be 'ddp' {of_resnet}")
    if activation_checkpointing:
        raise ValueError(f"`activation_checkpointing` (=True) must be False {of_resnet}")


def _share_batch_statistics(method: Method) -> None:
    if not any(isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) for module in method.modules()):
        return
    if device().type != "cuda":
        resnet = method.recipe.backbone == "resnet"
        allowed = "`backbone` (='resnet') must be 'vit'" if resnet else "`use_bn_in_head` (=True) must be False"
        raise ValueError(
            f"{allowed} in {world_size()} processes without GPUs: torch has no synchronised BatchNorm for CPUs"
        )
    method.student = nn.SyncBatchNorm.convert_sync_batchnorm(method.student)
    method.teacher = nn.SyncBatchNorm.convert_sync_batchnorm(method.teacher)
