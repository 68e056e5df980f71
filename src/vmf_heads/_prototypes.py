"""The last layer of a prototype head: prototypes w_k = g_k v_k / ||v_k|| and their scores <w_k, y>."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ._matmul import at_least_float32, autocast_dtype, mm_float32, without_autocast
from .special import log_vmf_normalizer


class Prototypes(nn.Module):
    """What `weight_norm(nn.Linear(dim, num_prototypes, bias=False))` is in DINO, without hooks.

    Parameters, in DINO's order: `weight_g` (K, 1) holds the norms, `weight_v` (K, p) the directions. Being hook-free
    it can be deep-copied, pickled and compiled. It saves `weight_g` and `weight_v`, and loads those, the names of
    `torch.nn.utils.parametrizations.weight_norm`, or the plain `weight` of a linear layer.
    """

    def __init__(self, dim: int, num_prototypes: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(num_prototypes, 1))
        self.weight_v = nn.Parameter(torch.empty(num_prototypes, dim))
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5))  # the initialisation of nn.Linear, as in DINO

    @property
    def weight(self) -> Tensor:
        """The prototypes (K, p), in float32 unless the parameters are float64."""
        return weight_norm(self.weight_v, self.scales)

    @property
    def scales(self) -> Tensor:
        """g_k (K,), of either sign."""
        return at_least_float32(self.weight_g).squeeze(1)

    @property
    def norms(self) -> Tensor:
        """||w_k|| = |g_k| (K,); kappa_k is this over the temperature."""
        return self.scales.abs()

    def forward(self, features: Tensor, *, exact: bool = False) -> Tensor:
        """Scores (..., K) of unit features (..., p), in float32.

        Under CUDA autocast the operands are rounded to the autocast dtype and the product accumulates in float32,
        unless `exact`; elsewhere nothing is rounded.
        """
        half = None if exact else autocast_dtype(features.device)
        if half is not None:
            return _HalfScores.apply(features, self.weight, half)
        with without_autocast(features.device):
            return F.linear(at_least_float32(features), self.weight)

    def extra_repr(self) -> str:
        """What print(module) shows."""
        return f"dim={self.weight_v.shape[1]}, num_prototypes={self.weight_v.shape[0]}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for new, parametrized in (("weight_g", "original0"), ("weight_v", "original1")):
            old = f"{prefix}parametrizations.weight.{parametrized}"
            if old in state_dict:
                state_dict[prefix + new] = state_dict.pop(old)
        if prefix + "weight" in state_dict:
            weight = at_least_float32(state_dict.pop(prefix + "weight"))
            norm = weight.norm(dim=1, keepdim=True)
            state_dict[prefix + "weight_g"] = norm
            # A prototype that is 0 needs some direction: 0 / 0 would make every output NaN.
            state_dict[prefix + "weight_v"] = torch.where(norm > 0, weight, 1)
        super()._load_from_state_dict(state_dict, prefix, *args)


def weight_norm(directions: Tensor, scales: Tensor) -> Tensor:
    """The prototypes w_k = scale_k v_k / ||v_k|| (K, p) of directions v (K, p) and scales (K,), in float32 or more."""
    # The kernel behind torch.nn.utils.weight_norm: DINO to the last bit, and its backward is one pass over (K, p).
    return torch._weight_norm(at_least_float32(directions), at_least_float32(scales)[:, None], 0)


def prototype_log_normalizer(norms: Tensor, p: int, temperature: float) -> Tensor:
    """log C_p(||w_k||/temperature) - log C_p(1/temperature), (K,) in float32: 0 for prototypes of norm 1.

    The constant does not change a softmax over k; with it, a head whose prototypes all have norm 1 is DINO's own.
    """
    with without_autocast(norms.device):
        with_unit = F.pad(norms, (0, 1), value=1.0)  # one call: the same kernel rounds both, and they cancel exactly
        log_c = log_vmf_normalizer(with_unit / temperature, p, relative=True)
        return log_c[:-1] - log_c[-1]


class _HalfScores(Function):
    """features @ prototypes.T of operands rounded to `dtype`, accumulated and returned in float32."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, prototypes: Tensor, dtype: torch.dtype) -> Tensor:
        y, w = features.to(dtype), prototypes.to(dtype)
        ctx.save_for_backward(y, w)
        return mm_float32(y.reshape(-1, y.shape[-1]), w.t()).view(*y.shape[:-1], w.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        y, w = ctx.saved_tensors
        g = grad.to(y.dtype).reshape(-1, w.shape[0])
        grad_y = mm_float32(g, w).view(y.shape) if ctx.needs_input_grad[0] else None
        grad_w = mm_float32(g.t(), y.reshape(-1, w.shape[1])) if ctx.needs_input_grad[1] else None
        return grad_y, grad_w, None
