"""Prototypes on the sphere: the last layer of a head, its scores <w_k, y>, and log C_p of each prototype."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F
from torch.utils import _pytree

from ._distributed import all_reduce_sum_, cut_like, whole
from ._matmul import at_least_float32, linear_float32, without_autocast
from ._shards import RowExchange, exchanges, local_rows, shards_of, to_own_rows
from .special import log_vmf_normalizer

__all__ = ["HeadOutput", "LinearPrototypes", "PrototypeLayer", "Prototypes", "prototype_log_normalizer", "weight_norm"]


class HeadOutput(NamedTuple):
    """Unit features together with the prototypes they belong to: the argument of `prototype_cross_entropy`.

    A head with output="prototypes" returns one. Because the prototypes then leave the model through its forward, their
    gradients are right under DistributedDataParallel(find_unused_parameters=True) and FSDP2, too, which do not see a
    read from outside. For any other head make one yourself: `HeadOutput(y, W, None)`.

    Attributes:
        features: y (..., p), unit vectors.
        directions: v (K, p), of any length; with `scales` None they are the prototypes w themselves.
        scales: g (K,), of either sign, with w_k = g_k v_k / ||v_k||; or None.

    Directions and scales may be DTensors that are cut along K (`vmf_heads.parallel`). Scores and their sum then take
    all ranks that share the prototypes out, each with rows of its own, and have no gradient.

    >>> import torch
    >>> from vmf_heads import HeadOutput
    >>> HeadOutput(torch.eye(2), torch.tensor([[3.0, 4.0]]), torch.tensor([2.0])).prototypes
    tensor([[1.2000, 1.6000]])
    """

    features: Tensor
    directions: Tensor
    scales: Tensor | None

    @property
    def prototypes(self) -> Tensor:
        """w (K, p); with scales it is made anew at every access."""
        return self.directions if self.scales is None else weight_norm(self.directions, self.scales)

    @property
    def norms(self) -> Tensor:
        """||w_k|| (K,), in float32 or more; kappa_k is this over the temperature."""
        scales = None if self.scales is None else at_least_float32(self.scales)
        return norms_of(HeadOutput(self.features, at_least_float32(self.directions), scales))

    def scores(self, *, exact: bool = False) -> Tensor:
        """<w_k, y> (..., K) in float32, rounded under CUDA autocast as in the head unless `exact`."""
        shards = shards_of(self.directions, "directions")
        if shards is None:
            return linear_float32(self.features, self.prototypes, exact=exact)
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in self):
            raise RuntimeError(
                "scores of prototypes that are cut over ranks have no gradient: train with `prototype_cross_entropy`, "
                "or with fused=True in a loss that has it; or ask for the scores under torch.no_grad()"
            )
        rows = self.features.flatten(0, -2)
        (exchange,) = exchanges(shards, rows)
        assert isinstance(exchange, RowExchange)
        scores = linear_float32(exchange.gather(rows), local_prototypes(self).prototypes, exact=exact)
        return to_own_rows(scores, exchange).unflatten(0, self.features.shape[:-1])

    def score_sum(self) -> Tensor:
        """The sum of <w_k, y> over all rows (K,), in float32 or more. Scores are linear in y, so w is not made.

        Of prototypes that are cut over ranks it is over the rows of all of these, and 0 for those of other ranks.
        """
        total = at_least_float32(self.features).flatten(0, -2).sum(dim=0)
        if (shards := shards_of(self.directions, "directions")) is not None:
            all_reduce_sum_(total, shards.group)
            return shards.spread(local_prototypes(self)._replace(features=total[None]).score_sum(), 0)
        directions = at_least_float32(self.directions)
        total = linear_float32(total, directions, exact=True)
        if self.scales is None:
            return total
        return total * at_least_float32(self.scales) / torch.linalg.vector_norm(directions, dim=1)


# So that torch.export.save can write a graph that takes or returns one, and torch.export.load reads its example
# inputs with weights_only=True. The first is not public in torch, but the only way for named tuples.
_pytree._register_namedtuple(HeadOutput, serialized_type_name="vmf_heads.HeadOutput")
torch.serialization.add_safe_globals([HeadOutput])


def local_prototypes(output: HeadOutput) -> HeadOutput:
    """Of prototypes that are cut over ranks those of this rank, with gradient; others as they are."""
    scales = None if output.scales is None else local_rows(output.scales)
    return HeadOutput(output.features, local_rows(output.directions), scales)


def norms_of(output: HeadOutput) -> Tensor:
    """||w_k|| (K,) of prototypes in float32 or float64.

    This is a function because torch 2.8 cannot trace a property of a named tuple.
    """
    if output.scales is None:
        return torch.linalg.vector_norm(output.directions, dim=1)
    return output.scales.abs()


class Prototypes(nn.Module):
    """What `weight_norm(nn.Linear(dim, num_prototypes, bias=False))` is in DINO, without hooks.

    Parameters, in DINO's order: `weight_g` (K, 1) holds the norms, `weight_v` (K, p) the directions. Being hook-free
    it can be deep-copied, pickled and compiled. It saves `weight_g` and `weight_v`, and loads those, the names of
    `torch.nn.utils.parametrizations.weight_norm`, or the plain `weight` of a linear layer.

    Args:
        dim: p, the dimension of the sphere's space.
        num_prototypes: K.
        freeze_norms: keep every norm at 1 (L2-normalised prototypes).

    Shape: (..., p) to (..., K), in float32.
    """

    cut_over_ranks = False  # see `vmf_heads.parallel`

    def __init__(self, dim: int, num_prototypes: int, *, freeze_norms: bool = False) -> None:
        super().__init__()
        self.dim = dim
        self.num_prototypes = num_prototypes
        self.weight_g = nn.Parameter(torch.empty(num_prototypes, 1), requires_grad=not freeze_norms)
        self.weight_v = nn.Parameter(torch.empty(num_prototypes, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Norms of 1 and random directions, as the constructor makes them."""
        nn.init.ones_(self.weight_g)
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5))  # the initialisation of nn.Linear, as in DINO

    @property
    def weight(self) -> Tensor:
        """The prototypes w (K, p), in float32 unless the parameters are float64."""
        return weight_norm(self.weight_v, self.scales)

    @property
    def scales(self) -> Tensor:
        """g_k (K,), of either sign."""
        return at_least_float32(self.weight_g).squeeze(1)

    @property
    def norms(self) -> Tensor:
        """||w_k|| = |g_k| (K,), as a forward sees them; kappa_k is this over the temperature."""
        return self.scales.abs()

    @torch.no_grad()
    def gathered_norms(self) -> Tensor:
        """||w_k|| (K,) outside of a forward, without gradient. Under FSDP2 K numbers are gathered: every rank calls."""
        return at_least_float32(whole(self.weight_g, "`weight_g`", self.num_prototypes)).squeeze(1).abs()

    @torch.no_grad()
    def gathered(self) -> Tensor:
        """The prototypes w (K, p) outside of a forward, without gradient; under FSDP2 every rank must call."""
        directions = whole(self.weight_v, "`weight_v`", self.num_prototypes)
        return weight_norm(directions, whole(self.weight_g, "`weight_g`", self.num_prototypes).squeeze(1))

    def with_features(self, features: Tensor) -> HeadOutput:
        """These features with these prototypes."""
        return HeadOutput(features, self.weight_v, self.weight_g.squeeze(1))

    @property
    def norms_require_grad(self) -> bool:
        """Whether the norms learn."""
        return self.weight_g.requires_grad

    def forward(self, features: Tensor, *, exact: bool = False) -> Tensor:
        """Scores <w_k, y> (..., K) of unit features (..., p), in float32.

        Under CUDA autocast the operands are rounded to the autocast dtype and the product accumulates in float32,
        unless `exact`; elsewhere nothing is rounded. Prototypes that are cut over ranks give scores without gradient.
        """
        if self.cut_over_ranks:
            return self.with_features(features).scores(exact=exact)
        return linear_float32(features, self.weight, exact=exact)

    def extra_repr(self) -> str:
        """What print(module) shows."""
        return f"dim={self.dim}, num_prototypes={self.num_prototypes}"

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
        for name in ("weight_g", "weight_v"):
            if self.cut_over_ranks and prefix + name in state_dict:
                state_dict[prefix + name] = cut_like(getattr(self, name), state_dict[prefix + name])
        super()._load_from_state_dict(state_dict, prefix, *args)


class LinearPrototypes(nn.Linear):
    """Prototypes that are the rows of a linear layer without bias, as in DINOv3: the parameter `weight` (K, p).

    Args:
        dim: p, the dimension of the sphere's space.
        num_prototypes: K.

    Shape: (..., p) to (..., K), in float32.
    """

    cut_over_ranks = False  # see `vmf_heads.parallel`

    def __init__(self, dim: int, num_prototypes: int) -> None:
        super().__init__(dim, num_prototypes, bias=False)
        self.dim = dim
        self.num_prototypes = num_prototypes

    @property
    def norms(self) -> Tensor:
        """||w_k|| (K,), as a forward sees them; kappa_k is this over the temperature."""
        return torch.linalg.vector_norm(at_least_float32(self.weight), dim=1)

    @torch.no_grad()
    def gathered_norms(self) -> Tensor:
        """||w_k|| (K,) outside of a forward, without gradient. Under FSDP2 K numbers are gathered: every rank calls."""
        return whole(self.norms, "`weight`", self.num_prototypes)

    @torch.no_grad()
    def gathered(self) -> Tensor:
        """The prototypes w (K, p) outside of a forward, without gradient; under FSDP2 every rank must call."""
        return at_least_float32(whole(self.weight.detach(), "`weight`", self.num_prototypes))

    def with_features(self, features: Tensor) -> HeadOutput:
        """These features with these prototypes."""
        return HeadOutput(features, self.weight, None)

    @property
    def norms_require_grad(self) -> bool:
        """Whether the norms learn."""
        return self.weight.requires_grad

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.cut_over_ranks and prefix + "weight" in state_dict:
            state_dict[prefix + "weight"] = cut_like(self.weight, state_dict[prefix + "weight"])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, features: Tensor, *, exact: bool = False) -> Tensor:
        """Scores <w_k, y> (..., K) of unit features (..., p), in float32.

        Operands are rounded to half precision, and their product is accumulated in float32, where the weight is in half
        precision itself, as FSDP's mixed precision has it, and under CUDA autocast unless `exact`. Prototypes that are
        cut over ranks give scores without gradient.
        """
        if self.cut_over_ranks:
            return self.with_features(features).scores(exact=exact)
        return linear_float32(features, self.weight, exact=exact)


PrototypeLayer = Prototypes | LinearPrototypes


def weight_norm(directions: Tensor, scales: Tensor) -> Tensor:
    """The prototypes w_k = scale_k v_k / ||v_k|| (K, p) of directions v (K, p) and scales (K,), in float32 or more."""
    if hasattr(directions, "placements"):
        raise RuntimeError(
            "the prototypes are cut over ranks, so that no rank has them all: `last_layer.gathered()` gathers them, "
            "and every rank must call it"
        )
    v, g = at_least_float32(directions), at_least_float32(scales)[:, None]
    if torch._C._are_functorch_transforms_active():
        return v * (g / torch.linalg.vector_norm(v, dim=1, keepdim=True))
    if torch.compiler.is_compiling() or v.device.type not in ("cpu", "cuda"):
        return torch._weight_norm(v, g, 0)
    result: Tensor = _WeightNorm.apply(v.contiguous(), g.contiguous())
    return result


class _WeightNorm(Function):
    """The kernel behind torch.nn.utils.weight_norm: DINO to the last bit, and its backward is one pass over (K, p).

    The gradient of that backward is wrong in torch (2.13: it takes the saved norms for constants), so a gradient that
    will be differentiated again is made of plain operations here.
    """

    @staticmethod
    def forward(ctx: Any, v: Tensor, g: Tensor) -> Tensor:
        w, norms = torch._weight_norm_interface(v, g, 0)
        ctx.save_for_backward(v, g, norms)
        return w

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        v, g, norms = ctx.saved_tensors
        if not torch.is_grad_enabled():
            dv, dg = torch.ops.aten._weight_norm_interface_backward(grad.contiguous(), v, g, norms, 0)
            return dv, dg
        length = torch.linalg.vector_norm(v, dim=1, keepdim=True)
        dg = (grad * v).sum(dim=1, keepdim=True) / length
        return g / length * (grad - dg / length * v), dg


def prototype_log_normalizer(norms: Tensor, p: int, temperature: float | Tensor) -> Tensor:
    """log C_p(||w_k|| / temperature) - log C_p(1 / temperature), (..., K) in float32: 0 for prototypes of norm 1.

    The constant does not change a softmax over k; with it, a head whose prototypes all have norm 1 is DINO's own.

    Args:
        norms: ||w_k|| (..., K).
        p: dimension of the sphere's space.
        temperature: tau > 0, with kappa_k = ||w_k|| / tau; or several of them as a tensor (..., 1).

    Reference: Govindarajan et al., ICLR 2023, Eq. 6.

    >>> import torch
    >>> from vmf_heads.prototypes import prototype_log_normalizer
    >>> prototype_log_normalizer(torch.tensor([0.5, 1.0, 2.0]), p=256, temperature=0.1)
    tensor([ 0.1463,  0.0000, -0.5837])
    """
    with without_autocast(norms.device):
        with_unit = F.pad(norms, (0, 1), value=1.0)  # one call: the same kernel rounds both, and they cancel exactly
        log_c = log_vmf_normalizer(with_unit / temperature, p, relative=True)
        return log_c[..., :-1] - log_c[..., -1:]
