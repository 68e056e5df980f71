"""The normaliser's arithmetic as one operator, for which Inductor writes code without tracing every operation.

torch.compile takes some hundredths of a second for each of the hundreds of operations of an expansion in few
dimensions: half a minute. Here it sees a single one. When Inductor asks for its code, the functions of `_expansion` run
once, on a `Lane` instead of a tensor.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import _debye, _expansion

Pointwise = Callable[[Tensor, int], Tensor]  # (kappa, p) -> same shape and dtype


def in_one(function: Pointwise, kappa: Tensor, p: int) -> Tensor:
    """`function(kappa, p)`, one of the three of `_expansion`; where torch.compile traces, a single operation.

    torch.export gets all the operations, because its program shall run without this library.
    """
    if torch.compiler.is_compiling():
        revision = _revision()
        if revision is not None:
            result: Tensor = torch.ops.vmf_heads.expansion(kappa, function.__name__, p, revision)
            return result
    return function(kappa, p)


@_expansion.constant_in_graphs
def _revision() -> str | None:
    """What tells the operator from that of another version; None for torch.export, or if torch has no place for it."""
    return None if torch.compiler.is_exporting() else _register()


@cache
def _register() -> str | None:
    try:
        from torch._inductor.lowering import make_pointwise, register_lowering

        # Inductor's cache on disk knows the operator by its arguments: other arithmetic needs another argument.
        sources = inspect.getsource(_expansion) + inspect.getsource(_debye)
    except (ImportError, OSError):
        return None

    @torch.library.custom_op("vmf_heads::expansion", mutates_args=(), tags=(torch.Tag.flexible_layout,))
    def operator(kappa: Tensor, function: str, p: int, revision: str) -> Tensor:
        return _function(function)(kappa, p)

    @operator.register_fake
    def _(kappa: Tensor, function: str, p: int, revision: str) -> Tensor:
        return torch.empty_like(kappa)

    @operator.register_vmap
    def _(info: Any, dims: Any, kappa: Tensor, function: str, p: int, revision: str) -> tuple[Tensor, int | None]:
        return torch.ops.vmf_heads.expansion(kappa, function, p, revision), dims[0]

    @register_lowering(torch.ops.vmf_heads.expansion.default, type_promotion_kind=None)
    def _(kappa: Any, function: str, p: int, revision: str) -> Any:
        def code(value: Any) -> Any:
            lane: Any = Lane(value, kappa.get_dtype())
            result: Any = _function(function)(lane, p)
            return result.value

        return make_pointwise(code)(kappa)

    return hashlib.sha256(sources.encode()).hexdigest()


def _function(name: str) -> Pointwise:
    function: Pointwise = getattr(_expansion, name)
    return function


class Lane:
    """One number of a kernel that Inductor writes, with the operations on tensors that `_expansion` uses."""

    def __init__(self, value: Any, dtype: torch.dtype) -> None:
        self.value, self.dtype = value, dtype

    def _constant(self, number: float) -> Lane:
        from torch._inductor.virtualized import ops

        return Lane(ops.constant(number, self.dtype), self.dtype)

    def _apply(self, operation: str, *operands: Lane | float) -> Lane:
        from torch._inductor.virtualized import ops

        lanes = [x if isinstance(x, Lane) else self._constant(x) for x in operands]
        return Lane(getattr(ops, operation)(*(lane.value for lane in lanes)), self.dtype)

    def __add__(self, other: Lane | float) -> Lane:
        return self._apply("add", self, other)

    __radd__ = __add__

    def __sub__(self, other: Lane | float) -> Lane:
        return self._apply("sub", self, other)

    def __rsub__(self, other: float) -> Lane:
        return self._apply("sub", other, self)

    def __mul__(self, other: Lane | float) -> Lane:
        return self._apply("mul", self, other)

    __rmul__ = __mul__

    def __truediv__(self, other: Lane | float) -> Lane:
        return self._apply("truediv", self, other)

    def __rtruediv__(self, other: float) -> Lane:
        return self._apply("truediv", other, self)

    def __neg__(self) -> Lane:
        return self._apply("neg", self)

    def __lt__(self, other: float) -> Lane:
        return self._apply("lt", self, other)

    def __le__(self, other: float) -> Lane:
        return self._apply("le", self, other)

    def clamp(self, min: float | None = None, max: float | None = None) -> Lane:
        """As of a tensor: NaN stays."""
        raised = self if min is None else self._apply("maximum", self, min)
        return raised if max is None else raised._apply("minimum", raised, max)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Lane:
        lane = next(x for x in args if isinstance(x, Lane))
        if function is torch.full_like:
            return lane._constant(args[1])
        return lane._apply(_OPERATIONS[function], *args)


_OPERATIONS = {torch.log1p: "log1p", torch.sqrt: "sqrt", torch.where: "where"}
