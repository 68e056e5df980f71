"""What a machine without GPU and without torchvision needs so that the original training scripts run unchanged.

Nothing of the repositories' own files is touched. Stand-ins are:

- `.cuda()` of tensors and modules, `torch.cuda.synchronize` and `set_device`, `device="cuda"`: stay on the CPU;
- the "nccl" backend: gloo, one process; `device_ids` of DistributedDataParallel: dropped;
- `torch.load` of checkpoints that hold an argparse.Namespace: `weights_only=False`, the default before torch 2.6;
- `torch.hub.list`, which would ask the network: an empty list;
- torchvision, timm, tensorboardX and munkres: empty modules, and an `ImageFolder` of random crops.
"""

import os
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo  # makes its table of torch's functions now, before some are replaced
import torch.distributed as dist
from torch import Tensor, nn


def install(crop_sizes: list[int], images: int) -> None:
    """Install all of them; every image of the stand-in ImageFolder is a list of crops of these sizes."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    _stay_on_cpu()
    _replace(dist, "init_process_group", _gloo)
    _replace(torch, "load", lambda load, *args, **kwargs: load(*args, **{"weights_only": False} | kwargs))
    _replace(
        nn.parallel,
        "DistributedDataParallel",
        lambda ddp, module, device_ids=None, **kwargs: ddp(module, **kwargs),
    )
    torch.hub.list = lambda *args, **kwargs: []
    _install_modules(crop_sizes, images)


def _stay_on_cpu() -> None:
    for kind in (Tensor, nn.Module):
        kind.cuda = lambda self, *args, **kwargs: self
    torch.cuda.synchronize = torch.cuda.set_device = lambda *args: None
    _replace(
        torch,
        "tensor",
        lambda tensor, *args, **kwargs: tensor(*args, **{k: v for k, v in kwargs.items() if v != "cuda"}),
    )


def _gloo(init: Callable, backend: str, init_method: str, world_size: int, rank: int) -> None:
    init("gloo", store=dist.HashStore(), world_size=world_size, rank=rank)


def _replace(module: Any, name: str, wrapper: Callable) -> None:
    original = getattr(module, name)
    setattr(module, name, lambda *args, **kwargs: wrapper(original, *args, **kwargs))


class _ImageFolder(torch.utils.data.Dataset):
    """Random crops that depend on the index only."""

    crop_sizes: tuple[int, ...] = ()
    images = 0

    def __init__(self, root: str, transform: Any = None) -> None: ...

    def __len__(self) -> int:
        return self.images

    def __getitem__(self, index: int) -> tuple[list[Tensor], int]:
        generator = torch.Generator().manual_seed(index)
        return [torch.randn(3, size, size, generator=generator) for size in self.crop_sizes], index % 3


class _Anything:
    """Takes any arguments and has any method."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


class _Module(types.ModuleType):
    """A module in which every class is `_Anything`."""

    def __getattr__(self, name: str) -> Any:
        if name[:1].isupper():
            return _Anything
        raise AttributeError(name)


def _install_modules(crop_sizes: list[int], images: int) -> None:
    _ImageFolder.crop_sizes, _ImageFolder.images = tuple(crop_sizes), images
    for name in ("torchvision", "tensorboardX", "munkres", "timm", "timm.models"):
        sys.modules[name] = _Module(name)
    for name in ("datasets", "transforms", "models"):
        module = sys.modules[f"torchvision.{name}"] = _Module(name)
        setattr(sys.modules["torchvision"], name, module)
    sys.modules["torchvision.datasets"].ImageFolder = _ImageFolder
    # Of timm, iBOT's vision transformer uses one decorator, and its Swin, which does not run here, three functions.
    layers, registry = (_Module(f"timm.models.{name}") for name in ("layers", "registry"))
    layers.to_2tuple = layers.trunc_normal_ = None
    registry.register_model = lambda function: function
    sys.modules |= {module.__name__: module for module in (layers, registry)}
