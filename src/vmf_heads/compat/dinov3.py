"""DINOv3 with vMF prototypes: `DINOHead` with the original's name and signature.

Experimental: the paper has DINO and iBOT only. The change to dinov3/train/ssl_meta_arch.py::

    -from dinov3.layers.dino_head import DINOHead
    +from vmf_heads.compat.dinov3 import DINOHead

The losses stay DINOv3's. They divide the student's logits by 0.1, this head's temperature, which gives Eq. 6; the
teacher's go through Sinkhorn-Knopp, which removes log C_p exactly, so that Eq. 7 and Eq. 9 have no part to play.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._checks import one_of
from .._matmul import at_least_float32, autocast_dtype, without_autocast
from .._prototypes import _HalfScores
from ..head import VMFPrototypeHead

__all__ = ["DINOHead"]

# What losses may ask of this head: its last layer is not weight-normalised, which the fused loss relies on.
OUTPUTS = ("logits", "scores")


class LinearPrototypes(nn.Linear):
    """The last layer of DINOv3's head, a linear layer without bias; the prototypes' norms are those of its rows."""

    def __init__(self, dim: int, num_prototypes: int) -> None:
        super().__init__(dim, num_prototypes, bias=False)

    @property
    def norms(self) -> Tensor:
        """||w_k|| (K,); kappa_k is this over the temperature."""
        return torch.linalg.vector_norm(at_least_float32(self.weight), dim=1)

    @property
    def weight_g(self) -> Tensor:
        """The norms (K, 1) under the name they have in `Prototypes`, for `attach`; here they are no parameter."""
        return self.norms.unsqueeze(1)

    @property
    def weight_v(self) -> Tensor:
        """The weight under the name it has in `Prototypes`, for `attach`."""
        return self.weight

    def forward(self, features: Tensor) -> Tensor:
        """Scores (..., K) of unit features (..., p), in float32.

        Operands are rounded to half precision, and their product is accumulated in float32, where the weight is in half
        precision itself, as FSDP's mixed precision has it, and under CUDA autocast.
        """
        is_half = self.weight.dtype in (torch.float16, torch.bfloat16)
        half = self.weight.dtype if is_half else autocast_dtype(features.device)
        if half is not None:
            return _HalfScores.apply(features, self.weight, half)
        with without_autocast(features.device):
            return F.linear(at_least_float32(features), self.weight)


class DINOHead(VMFPrototypeHead):
    """DINOv3's head with log C_p of each prototype in its logits; see `VMFPrototypeHead`. Experimental.

    Parameter names and order are DINOv3's: `mlp.*`, `last_layer.weight` (K, p), without weight normalisation. May be
    built on the meta device: after `to_empty`, `init_weights` sets everything there is. At DINOv3's initialisation the
    prototypes have norm 0.02 sqrt(p) (0.32 for p = 256), so kappa is 3.2 where a DINO head starts from 10.

    Args:
        in_dim, out_dim, use_bn, nlayers, hidden_dim, bottleneck_dim, mlp_bias: as in DINOv3.
        temperature: what the student's loss divides by, 0.1 in DINOv3.
        normalizer: "vmf" adds log C_p; "none" is DINOv3's own head.

    Shape: (..., in_dim) to (..., out_dim), in float32.

    Raises:
        ValueError, TypeError: an argument is out of its range.

    Source: Siméoni et al., 2025; Govindarajan et al., ICLR 2023, Eq. 6.

    >>> import torch
    >>> from vmf_heads.compat.dinov3 import DINOHead
    >>> head = DINOHead(32, 100, hidden_dim=16, bottleneck_dim=8)
    >>> head.init_weights()
    >>> features = head(torch.randn(4, 32), no_last_layer=True)
    >>> features.shape, head(features, only_last_layer=True).shape
    (torch.Size([4, 8]), torch.Size([4, 100]))
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        use_bn: bool = False,
        nlayers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        mlp_bias: bool = True,
        *,
        temperature: float = 0.1,
        normalizer: str = "vmf",
    ) -> None:
        super().__init__(
            in_dim,
            out_dim,
            use_bn=use_bn,
            nlayers=max(nlayers, 1),
            hidden_dim=hidden_dim,
            bottleneck_dim=bottleneck_dim,
            mlp_bias=mlp_bias,
            temperature=temperature,
            normalizer=normalizer,
        )
        self.last_layer = LinearPrototypes(bottleneck_dim, out_dim)  # type: ignore[assignment]

    @torch.no_grad()
    def init_weights(self) -> None:
        """Every linear layer, the last one included, as DINOv3 does: normal with deviation 0.02, biases 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(  # type: ignore[override]
        self, x: Tensor, no_last_layer: bool = False, only_last_layer: bool = False
    ) -> Tensor:
        """Logits (..., K) of backbone features `x` (..., in_dim).

        `no_last_layer` stops at the unit features (..., p); `only_last_layer` starts from them.
        """
        dim, name = (self.bottleneck_dim, "bottleneck_dim") if only_last_layer else (self.in_dim, "in_dim")
        if x.shape[-1:] != (dim,):
            raise ValueError(f"`x` (of shape {tuple(x.shape)}) must end in `{name}` (={dim})")
        features = x if only_last_layer else self._features(x)
        if no_last_layer:
            return features
        scores = self.last_layer(features)
        if (self._attached_output or self.output) == "scores":
            self.last_prototype_norms = self.last_layer.norms.detach().clone()
            return scores
        if self.normalizer == "none":
            return scores
        return scores + self.temperature * self.log_normalizer(self.temperature)

    def attach_output(self, output: str) -> None:
        """As `VMFPrototypeHead.attach_output`; "logits" and "scores" only."""
        super().attach_output(one_of("output", output, OUTPUTS))
