"""Prototypes beyond one device: each rank of a mesh dimension holds some of them, and no rank holds all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor, nn

from ._distributed import is_sharded
from .prototypes import LinearPrototypes, PrototypeLayer, Prototypes

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["prototype_parameters", "shard_prototypes"]

Module = TypeVar("Module", bound=nn.Module)


def shard_prototypes(module: Module, mesh: DeviceMesh) -> Module:
    """Cut the prototypes of every head inside `module` over the ranks of `mesh`, in place: tensor parallelism along K.

    A rank then holds K / N prototypes, their gradients and optimiser state, and computes only their logits, for the
    features of all N ranks; see `prototype_cross_entropy` for what is sent. Everything else of `module` stays as it
    is and works on the images of its own rank, so each rank has images of its own, as in data parallelism. Losses and
    gradients are those of the whole head to rounding.

    Call it for student and teacher, before DistributedDataParallel, fully_shard, the optimiser and `attach`. Losses
    need fused=True. All ranks must hold the same prototypes when they call it: rank 0 sends none.

    - DistributedDataParallel must not synchronise the prototypes. It does not if `module` is what will be wrapped.
    - fully_shard must not cut them once more: `fully_shard(model, ignored_params=set(prototype_parameters(model)))`.
    - `torch.nn.utils.clip_grad_norm_` takes no mixture of DTensors and others: docs/scale.md has the lines for it.
    - A state dict holds DTensors, as those of fully_shard do. `load_state_dict` takes whole tensors, too.

    Args:
        module: contains `Prototypes` or `LinearPrototypes`.
        mesh: of one dimension, over which the prototypes are cut; or of two (copies, shards), as in fully_shard: cut
            over the second and the same along the first, along which gradients are averaged. The mesh must hold all
            ranks that train. N, the size of the last dimension, need not divide K.

    Returns:
        `module`. Each `weight_g` (K, 1), `weight_v` (K, p) or `weight` (K, p) in it is a DTensor.

    Raises:
        ValueError: `module` has no prototypes, they are cut already, the mesh has more dimensions, or a rank would
            get no prototype.

    Reference: docs/scale.md.

    >>> import torch.distributed as dist
    >>> from torch.distributed.device_mesh import init_device_mesh
    >>> from vmf_heads import VMFPrototypeHead
    >>> from vmf_heads.parallel import shard_prototypes
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # torchrun has the numbers
    >>> head = VMFPrototypeHead(16, 32, hidden_dim=16, bottleneck_dim=8)
    >>> head = shard_prototypes(head, init_device_mesh("cpu", (1,)))
    >>> head.last_layer.weight_v.placements
    (Shard(dim=0),)
    >>> dist.destroy_process_group()
    """
    layers = list(_layers(module))
    if not layers:
        raise ValueError(f"`module` (a {type(module).__name__}) must contain the prototypes of a head")
    if mesh.ndim not in (1, 2):
        raise ValueError(f"`mesh` (of {mesh.ndim} dimensions) must have one (shards) or two (copies, shards)")
    ranks = mesh.size(mesh.ndim - 1)
    for layer in layers:
        if any(map(is_sharded, layer.parameters())):
            raise ValueError("the prototypes in `module` are cut over ranks already; shard_prototypes comes first")
        # As torch.chunk cuts: all but the last shards have as many prototypes as the first.
        if -(-layer.num_prototypes // ranks) * (ranks - 1) >= layer.num_prototypes:
            raise ValueError(
                f"`mesh` (of {ranks} ranks to share prototypes out to) must have fewer of them: one would get none of "
                f"{layer.num_prototypes} prototypes"
            )
    for layer in layers:
        _cut(layer, mesh)
    _hide_from_ddp(module)
    return module


def prototype_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of all prototypes inside `module`: what fully_shard is to ignore after `shard_prototypes`.

    >>> from vmf_heads import VMFPrototypeHead
    >>> from vmf_heads.parallel import prototype_parameters
    >>> [tuple(p.shape) for p in prototype_parameters(VMFPrototypeHead(16, 32, hidden_dim=16, bottleneck_dim=8))]
    [(32, 1), (32, 8)]
    """
    for layer in _layers(module):
        yield from layer.parameters()


def _layers(module: nn.Module) -> Iterator[PrototypeLayer]:
    return (layer for layer in module.modules() if isinstance(layer, (Prototypes, LinearPrototypes)))


def _cut(layer: PrototypeLayer, mesh: DeviceMesh) -> None:
    # Imported here, because `import vmf_heads` is faster without.
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    placements = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]
    for name, parameter in list(layer.named_parameters(recurse=False)):
        whole: Tensor = parameter.detach()
        # A copy, or the whole tensor would stay in memory behind the part of it.
        rows = distribute_tensor(whole, mesh, placements, src_data_rank=None).clone()
        setattr(layer, name, nn.Parameter(rows, requires_grad=parameter.requires_grad))
    layer.cut_over_ranks = True


def _hide_from_ddp(module: nn.Module) -> None:
    from torch.nn.parallel import DistributedDataParallel

    own = {id(parameter) for parameter in prototype_parameters(module)}
    names = [name for name, parameter in module.named_parameters(remove_duplicate=False) if id(parameter) in own]
    # The only way, and of that name since torch 1.7: PyTorch calls it a prototype of its own.
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)
