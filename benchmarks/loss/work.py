"""The work of a loss: multiplications in matrix products, and bytes that operations read and write."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Where their two operands begin.
_PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "addmm_": 1, "mv": 0, "addmv": 1, "addmv_": 1}
_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty"}
_FILLS = {"fill_", "zero_", "zeros", "zeros_like", "new_zeros", "ones", "ones_like", "new_full", "full"}


def work(step: Callable[[], object]) -> dict[str, int]:
    """`multiplications` in the matrix products of a step, and `moved_bytes` by all its operations.

    Every operand of an operation counts as read once, every result as written once, as if no cache held them. A view
    moves nothing, and what is filled or lies in `out=` is not read.
    """
    with _Work() as counted:
        step()
    return {"multiplications": counted.multiplications, "moved_bytes": counted.moved_bytes}


class _Work(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.multiplications = self.moved_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if func.is_view or name in _ALLOCATIONS:
            return result
        if name in _PRODUCTS:
            left, right = args[_PRODUCTS[name] :][:2]
            self.multiplications += left.numel() * (right.shape[-1] if right.dim() > 1 else 1)
        operands = {key: value for key, value in kwargs.items() if key != "out"}
        read = [] if name in _FILLS else tree_leaves((args, operands))
        self.moved_bytes += sum(x.nbytes for x in (*read, *tree_leaves(result)) if isinstance(x, Tensor))
        return result
