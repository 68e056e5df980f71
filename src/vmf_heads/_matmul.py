"""Matrix products in half precision that accumulate, and return, float32."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from ._once import once_differentiable

# torch.mm takes `out_dtype` since 2.8, on CUDA only (on CPU it raises).
_MM_HAS_OUT_DTYPE = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) >= (2, 8)


def mm_float32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of two half-precision (or float32) matrices, in float32."""
    with without_autocast(a.device):  # which would round the result again
        if a.is_cuda and _MM_HAS_OUT_DTYPE and a.dtype != torch.float32:
            return torch.mm(a, b, out_dtype=torch.float32)
        return a.float() @ b.float()


def linear_float32(x: Tensor, weight: Tensor, *, exact: bool = False) -> Tensor:
    """x @ weight.T (..., K) of x (..., p) and weight (K, p), in float32 (float64 for float64 operands).

    Operands are rounded to half precision, and the product is accumulated in float32, where the weight is in half
    precision itself, as FSDP's mixed precision has it, and under CUDA autocast unless `exact`.
    """
    is_half = weight.dtype in (torch.float16, torch.bfloat16)
    half = weight.dtype if is_half else None if exact else autocast_dtype(x.device)
    if half is not None:
        result: Tensor = _HalfLinear.apply(x, weight, half)
        return result
    with without_autocast(x.device):
        return F.linear(at_least_float32(x), weight)


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


class _HalfLinear(Function):
    """x @ weight.T of operands rounded to `dtype`, accumulated and returned in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        x, weight = x.to(dtype), weight.to(dtype)
        ctx.save_for_backward(x, weight)
        return mm_float32(x.reshape(-1, x.shape[-1]), weight.t()).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable(
        "a gradient of scores from half-precision products was taken with create_graph=True, but it cannot be "
        "differentiated again. For a gradient penalty or a Hessian compute the scores in float32: without autocast, or "
        "with float32_scores=True, and with parameters in float32"
    )
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        g = grad.to(x.dtype).reshape(-1, weight.shape[0])
        grad_x = mm_float32(g, weight).view(x.shape) if ctx.needs_input_grad[0] else None
        grad_weight = mm_float32(g.t(), x.reshape(-1, weight.shape[1])) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, None
