"""Matrix products in half precision that accumulate, and return, float32."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

# torch.mm takes `out_dtype` since 2.8, on CUDA only (on CPU it raises).
_MM_HAS_OUT_DTYPE = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) >= (2, 8)


def mm_float32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of two half-precision (or float32) matrices, in float32."""
    with without_autocast(a.device):  # which would round the result again
        if a.is_cuda and _MM_HAS_OUT_DTYPE and a.dtype != torch.float32:
            return torch.mm(a, b, out_dtype=torch.float32)
        return a.float() @ b.float()


def average(p: Tensor, x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """p @ x for p in [-1, 1], of operands rounded to `dtype` if that is not None; float32 or more."""
    if dtype is None:
        return p @ x
    if dtype is not torch.float16:
        return mm_float32(p.to(dtype), x.to(dtype))
    # float16 ends at 6e-8: small probabilities move into its range before they are rounded.
    return mm_float32((p * 2**14).to(dtype), x.to(dtype)).mul_(2**-14)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that products on this device round their operands to, or None: only CUDA autocast asks for one."""
    if device.type == "cuda" and torch.is_autocast_enabled("cuda"):
        return torch.get_autocast_dtype("cuda")
    return None


def at_least_float32(x: Tensor) -> Tensor:
    """`x`, with half precision cast up."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def has_autocast(device: torch.device) -> bool:
    """Whether autocast exists for `device`: everywhere but on meta.

    `torch.amp.is_autocast_available` asks the same, but torch.compile cannot trace it before torch 2.10.
    """
    return device.type != "meta"


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """A context in which autocast is off for `device`; nothing to do where there is none."""
    return torch.autocast(device.type, enabled=False) if has_autocast(device) else nullcontext()
