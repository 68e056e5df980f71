"""One compiled pointwise kernel per (function, p, dtype), for eager callers on CUDA.

The expansion is some fifty elementwise operations; launched one by one they cost more than they compute. torch.compile
turns them into one kernel (Triton on CUDA, C++ on CPU); inside a region that the user compiles they are fused there
anyway.
"""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable
from functools import cache
from types import FunctionType

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.nn import functional as F
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ._lowering import Pointwise, in_one

_ROW = 64  # a multiple of the numbers in any vector register
_warned = False


def evaluate(function: Pointwise, kappa: Tensor, p: int, compiled: bool | None) -> Tensor:
    """`function(kappa, p)`, through one compiled kernel where that is wanted (`compiled`) and possible.

    compiled=None means: on CUDA. Where the kernel cannot be built, `compiled=None` warns once and goes on with plain
    operations; `compiled=True` raises RuntimeError.
    """
    global _warned
    wanted = kappa.is_cuda if compiled is None else compiled
    wanted = wanted and kappa.numel() > 1  # lengths 0 and 1 are specialised by torch.compile: a kernel each
    if not wanted or not is_plain_eager(kappa) or (compiled is None and _warned):
        return function(kappa, p)
    try:
        result = _kernel(function, p, kappa.dtype)(_in_rows(kappa))
        return result.view(-1)[: kappa.numel()].view(kappa.shape).data
    except torch.cuda.OutOfMemoryError:
        raise  # says nothing about the compiler
    except Exception as error:
        if compiled:
            raise RuntimeError(
                "`compiled` (=True) needs torch.compile to work on this machine (Triton on CUDA, a C++ compiler on "
                "CPU); it failed with the error above. `compiled=None` falls back to plain operations, "
                "`compiled=False` never compiles"
            ) from error
        _warned = True
        warnings.warn(
            f"vmf_heads: torch.compile failed ({type(error).__name__}: {error}); the normaliser goes on with plain "
            "operations, which are exact but slower. Pass `compiled=False` to choose them without this warning.",
            RuntimeWarning,
            stacklevel=4,
        )
        return function(kappa, p)


def is_plain_eager(tensor: Tensor) -> bool:
    """Whether nothing traces, transforms or replaces the operations on `tensor`."""
    return has_values(tensor) and _get_current_dispatch_mode() is None


def has_values(tensor: Tensor) -> bool:
    """Whether a number of `tensor` can be read here: nothing traces or transforms what is done to it."""
    return (
        not torch.compiler.is_compiling()
        and not torch._C._get_tracing_state()
        and not torch._C._are_functorch_transforms_active()
        and get_proxy_mode() is None
        and type(tensor) in (Tensor, torch.nn.Parameter)
        and not tensor.is_meta
    )


def _in_rows(kappa: Tensor) -> Tensor:
    """The numbers in `kappa`, contiguous and in a shape of which one kernel with a symbolic length serves all.

    On the CPU they are in at least two rows of a fixed length, the last one filled with zeros: a loop over them has no
    remainder, for which Inductor would write, and the C++ compiler read, all the code a second time.
    """
    flat = kappa.reshape(-1).contiguous().data  # no view: torch.compile guards on the base of one, and this has none
    if kappa.device.type != "cpu":
        return flat
    rows = max(2, math.ceil(len(flat) / _ROW))  # a single row would be specialised
    missing = rows * _ROW - len(flat)
    in_rows = (F.pad(flat, (0, missing)) if missing else flat).view(rows, _ROW).data
    torch._dynamo.mark_static(in_rows, 1)
    return in_rows


@cache
def _kernel(function: Pointwise, p: int, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    def pointwise(kappa: Tensor) -> Tensor:
        return in_one(function, kappa, operator.index(p))  # operator.index: a constant for torch.compile, not a symbol

    # torch.compile keeps its cache, and its limit on recompilations, per code object: each kernel needs its own.
    code = pointwise.__code__.replace(co_name=f"{function.__name__}_{p}_{str(dtype).removeprefix('torch.')}")
    own = FunctionType(code, pointwise.__globals__, code.co_name, None, pointwise.__closure__)
    return torch.compile(own, dynamic=True, fullgraph=True)
