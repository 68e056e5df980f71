"""Prototypes beyond one device: each rank of a mesh dimension holds some of them, and no rank holds all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from ._checks import positive
from ._distributed import is_sharded, whole
from ._shards import place_of
from .prototypes import LinearPrototypes, PrototypeLayer, Prototypes

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["clip_grad_norm_", "prototype_parameters", "shard_prototypes"]

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
    - `torch.nn.utils.clip_grad_norm_` takes no mixture of DTensors and others: use `clip_grad_norm_` of this module.
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


@torch.no_grad()
def clip_grad_norm_(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` for parameters that are cut over different ranks, or over none.

    Gradients are clipped by the Euclidean norm of all of them together, as if none was cut; every rank must call.

    Args:
        parameters: whose gradients are clipped, in place; those without a gradient are passed over.
        max_norm: largest norm, > 0.

    Returns:
        The norm (a scalar tensor) before clipping, the same on every rank.

    Raises:
        ValueError, TypeError: `max_norm` is not a finite number > 0.

    >>> import torch
    >>> from vmf_heads.parallel import clip_grad_norm_
    >>> x = torch.ones(4, requires_grad=True)
    >>> (3 * x).sum().backward()
    >>> clip_grad_norm_([x], max_norm=1.0), x.grad
    (tensor(6.), tensor([0.5000, 0.5000, 0.5000, 0.5000]))
    """
    positive("max_norm", max_norm)
    by_place: dict[Any, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            by_place.setdefault(place_of(parameter.grad), []).append(parameter.grad)
    norms = [whole(nn.utils.get_total_norm(gradients), "the norm") for gradients in by_place.values()]
    total = torch.stack(norms).norm() if norms else torch.zeros(())
    factor = (max_norm / (total + 1e-6)).clamp(max=1)
    for gradient in (gradient for gradients in by_place.values() for gradient in gradients):
        (gradient.to_local() if hasattr(gradient, "to_local") else gradient).mul_(factor)
    return total


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
