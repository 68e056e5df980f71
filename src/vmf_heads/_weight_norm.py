"""Products with weight-normalised prototypes w_k = scale_k v_k / ||v_k|| that never make them, nor their gradient.

Every product reads v itself. What w has on top of v is one factor per prototype, f_k = scale_k / ||v_k||, which goes to
the [rows, K] numbers of a chunk, and weight normalisation's own gradient turns that of w into that of v in place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._matmul import average, mm_float32

_BLOCK = 2**20  # numbers of the gradient that are worked on at a time: few enough to stay in a cache


class WeightNormed:
    """The prototypes of directions v (K, p) and scales (K,), or v itself where `scale` is None, as an operand.

    With a half-precision `dtype` the operand is w rounded to it, (K, p) of two bytes each.
    """

    def __init__(self, v: Tensor, scale: Tensor | None, dtype: torch.dtype | None) -> None:
        self.v, self.dtype = v, dtype
        self.factor: Tensor | None = None
        if scale is not None:
            self._length = torch.linalg.vector_norm(v, dim=1)
            self.factor = scale / self._length
        self._operand = v
        if dtype is not None:
            rounded = torch.empty_like(v, dtype=dtype)
            self._operand = rounded.copy_(v) if self.factor is None else torch.mul(v, self.factor[:, None], out=rounded)

    @property
    def late_factor(self) -> Tensor | None:
        """What the logits of `products` still lack as a factor (K,)."""
        return self.factor if self.dtype is None else None

    def products(self, y: Tensor, buffer: Tensor) -> Tensor:
        """<y, w> (c, K) but for `late_factor`; in `buffer` unless the operands are in half precision."""
        if self.dtype is None:
            return torch.mm(y, self._operand.t(), out=buffer[: len(y)])
        return mm_float32(y.to(self.dtype), self._operand.t())

    def average_(self, p: Tensor) -> Tensor:
        """p @ w (c, p) for p (c, K) in [-1, 1], which is overwritten."""
        return average(p if self.late_factor is None else p.mul_(self.late_factor), self._operand, self.dtype)

    def gradients_(self, dw: Tensor, wanted: tuple[bool, bool]) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of v and of scale, where `wanted`, from that of w: dw (K, p), which becomes that of v.

        With u = v / ||v||: d/dscale = <u, dw> and d/dv = f (dw - <u, dw> u).
        """
        if self.factor is None:
            return dw, None
        along = torch.empty_like(self.factor)
        blocks = (x.split(max(1, _BLOCK // dw.shape[1])) for x in (dw, self.v, self.factor, self._length, along))
        for gradient, v, factor, length, result in zip(*blocks, strict=True):
            torch.div(torch.linalg.vecdot(gradient, v), length, out=result)
            if wanted[0]:
                gradient.mul_(factor[:, None]).addcmul_(v, (factor * result / length)[:, None], value=-1)
        return dw if wanted[0] else None, along if wanted[1] else None
