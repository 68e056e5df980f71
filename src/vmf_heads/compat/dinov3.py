"""DINOv3 with vMF prototypes: `DINOHead` with the original's name and signature.

Experimental: the paper has DINO and iBOT only. The change to dinov3/train/ssl_meta_arch.py::

    -from dinov3.layers.dino_head import DINOHead
    +from vmf_heads.compat.dinov3 import DINOHead

The losses stay DINOv3's. They divide the student's logits by 0.1, this head's temperature, which gives Eq. 6; the
teacher's go through Sinkhorn-Knopp, which removes log C_p exactly, so that Eq. 7 and Eq. 9 have no part to play.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .._checks import at_least
from ..head import PrototypeHead
from ..mlp import projection_mlp
from ..prototypes import LinearPrototypes

__all__ = ["DINOHead"]


class DINOHead(PrototypeHead):
    """DINOv3's head with log C_p of each prototype in its logits; see `VMFPrototypeHead`. Experimental.

    Parameter names and order are DINOv3's: `mlp.*`, `last_layer.weight` (K, p), without weight normalisation. May be
    built on the meta device: after `to_empty`, `init_weights` sets everything there is. At DINOv3's initialisation the
    prototypes have norm 0.02 sqrt(p) (0.32 for p = 256), so kappa is 3.2 where a DINO head starts from 10.

    Args:
        in_dim: dimension of the backbone's features.
        out_dim: number of prototypes K.
        use_bn: batch normalisation after the hidden layers of the MLP.
        nlayers: number of linear layers in the MLP; less than 1 counts as 1, as in DINOv3.
        hidden_dim: width of the hidden layers.
        bottleneck_dim: dimension p of the sphere's space, >= 2.
        mlp_bias: whether the linear layers of the MLP have biases.
        temperature: what the student's loss divides by, 0.1 in DINOv3.
        normalizer: "vmf" adds log C_p; "none" is DINOv3's own head.

    Shape: (..., in_dim) to (..., out_dim), in float32.

    Raises:
        ValueError, TypeError: an argument is out of its range.

    Reference: Siméoni et al., 2025; Govindarajan et al., ICLR 2023, Eq. 6.

    >>> import torch
    >>> from vmf_heads.compat.dinov3 import DINOHead
    >>> head = DINOHead(32, 100, hidden_dim=16, bottleneck_dim=8)
    >>> head.init_weights()
    >>> features = head(torch.randn(4, 32), no_last_layer=True)
    >>> features.shape, head(features, only_last_layer=True).shape
    (torch.Size([4, 8]), torch.Size([4, 100]))
    """

    SERVES_STOCK_LOSSES: ClassVar[bool] = True  # Sinkhorn-Knopp removes the teacher's log C_p, at any temperature

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
        mlp = projection_mlp(
            in_dim,
            hidden_dim,
            bottleneck_dim,
            max(nlayers, 1),
            norm=(lambda: nn.BatchNorm1d(hidden_dim)) if use_bn else None,
            hidden_bias=mlp_bias,
            out_bias=mlp_bias,
        )
        prototypes = LinearPrototypes(bottleneck_dim, at_least("out_dim", out_dim, 1))
        super().__init__(in_dim, mlp, prototypes, temperature=temperature, normalizer=normalizer)

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
    ) -> Any:
        """Logits (..., K) of backbone features `x` (..., in_dim).

        Args:
            x: backbone features, or unit features (..., p) with `only_last_layer`.
            no_last_layer: stop at the unit features.
            only_last_layer: start from the unit features.
        """
        if only_last_layer and x.shape[-1:] != (self.bottleneck_dim,):
            raise ValueError(f"`x` (of shape {tuple(x.shape)}) must end in `bottleneck_dim` (={self.bottleneck_dim})")
        features = x if only_last_layer else self.features(x)
        return features if no_last_layer else self.read(self.last_layer, features)
