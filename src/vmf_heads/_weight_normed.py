"""Prototypes and probabilities as operands of matrix products: w is never made, and half precision rounds no peak."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _memory
from ._matmul import average, mm_float32


class WeightNormed:
    """Prototypes w_k = scale_k v_k / ||v_k||, of directions v (K, p) and scales (K,), as an operand that is never made.

    A product reads v itself. What w has on top of v is one factor per prototype, f_k = scale_k / ||v_k||, which goes to
    the (rows, K) numbers of a chunk. So neither w nor its gradient, (K, p) each, exists. Without scales w is v. With a
    half-precision `dtype` the operand is w rounded to it, (K, p) of two bytes each.
    """

    def __init__(self, v: Tensor, scales: Tensor | None, dtype: torch.dtype | None) -> None:
        self.v, self.dtype = v, dtype
        self.factor: Tensor | None = None
        if scales is not None:
            self._length = torch.linalg.vector_norm(v, dim=1)
            self.factor = scales / self._length
        self._operand = v
        if dtype is not None:
            rounded = torch.empty_like(v, dtype=dtype)
            self._operand = rounded.copy_(v) if self.factor is None else torch.mul(v, self.factor[:, None], out=rounded)

    @property
    def late_factor(self) -> Tensor | None:
        """The factor (K,) that the result of `products` still lacks."""
        return self.factor if self.dtype is None else None

    def products(self, y: Tensor, buffer: Tensor, prototypes: slice) -> Tensor:
        """<y, w> (c, k) for k of the prototypes, but for `late_factor`; in `buffer` unless in half precision."""
        if self.dtype is None:
            return torch.mm(y, self._operand[prototypes].t(), out=buffer)
        return mm_float32(y.to(self.dtype), self._operand[prototypes].t())

    def rounded(self, y: Tensor) -> Tensor:
        """`y` as `products` takes it, in its own dtype."""
        return y if self.dtype is None else y.to(self.dtype).to(y.dtype)

    def average_(self, p: Tensor, peaks: Peaks | None = None) -> Tensor:
        """p @ w (c, p) for p (c, K) in [-1, 1], which is overwritten, with the `peaks` that were taken from it."""
        if self.dtype is not None:
            result = average(p, self._operand, self.dtype)
            return result if peaks is None else result.addcmul_(peaks.values, self._operand[peaks.columns])
        return (p if self.factor is None else p.mul_(self.factor)) @ self._operand

    def gradients_(
        self, dw: Tensor, along_w: Tensor | None, wanted: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of v and of the scales, where `wanted`, from that of w: dw (K, p), which becomes that of v.

        With u = v / ||v||: d/dscale = <u, dw> and d/dv = f (dw - <u, dw> u). What reaches w through its norm alone is
        along_w (K,) times w: it adds to the gradient of a scale, and, without scales, to that of w.
        """
        if self.factor is None:
            return dw if along_w is None else dw.addcmul_(self.v, along_w[:, None]), None
        if torch.compiler.is_compiling():  # which makes one pass of it, if nothing is in place
            along = (dw * self.v).sum(dim=1) / self._length
            dw = dw * self.factor[:, None] - (self.factor * along / self._length)[:, None] * self.v
        else:
            along = self._gradients_in_blocks_(dw, wanted[0])
        if along_w is not None:
            along = torch.addcmul(along, along_w, self.factor * self._length)
        return dw if wanted[0] else None, along if wanted[1] else None

    def _gradients_in_blocks_(self, dw: Tensor, wants_dv: bool) -> Tensor:
        """The gradient of the scales; dw (K, p) becomes that of v if it is wanted."""
        assert self.factor is not None
        along = torch.empty_like(self.factor)
        rows = max(1, _memory.CACHE_BYTES // (4 * dw.shape[1]))  # of several passes that find them in a cache
        blocks = (x.split(rows) for x in (dw, self.v, self.factor, self._length, along))
        for gradient, v, factor, length, result in zip(*blocks, strict=True):
            torch.div(torch.linalg.vecdot(gradient, v), length, out=result)
            if wants_dv:
                gradient.mul_(factor[:, None]).addcmul_(v, (factor * result / length)[:, None], value=-1)
        return along


class Peaks(NamedTuple):
    """The largest probability of every row, which a product in half precision shall not round.

    Where predictions are confident and right, P and T are nearly the same 1 in one place, and P - T is the little that
    is left: less than the rounding of P and of T. Without that place their rows sum to as little as P - T itself.
    """

    values: Tensor  # (c, 1)
    columns: Tensor  # (c,)


def take_peaks_(p: Tensor) -> Peaks:
    """The peaks of p (c, K), which is 0 there from now on."""
    values, columns = p.max(dim=1, keepdim=True)
    p.scatter_(1, columns, 0)
    return Peaks(values, columns.squeeze(1))


def add_average(
    total: Tensor, p: Tensor, x: Tensor, dtype: torch.dtype | None, peaks: Peaks | None, *, is_empty: bool
) -> None:
    """total (K, p) += p' @ x for p (c, K) in [-1, 1], with the `peaks` that were taken from it; = where `is_empty`."""
    if dtype is None:
        total.addmm_(p.t(), x, beta=0 if is_empty else 1)
        return
    # Weighted features may be smaller than what float16 can hold.
    largest = torch.linalg.vector_norm(x, torch.inf).clamp(min=torch.finfo(x.dtype).tiny)
    product = average(p.t(), x / largest, dtype)
    if is_empty:
        torch.mul(product, largest, out=total)
    else:
        total.add_(product.mul_(largest))
    if peaks is not None:
        total.index_add_(0, peaks.columns, peaks.values * x)
