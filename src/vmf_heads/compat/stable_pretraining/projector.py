"""stable-pretraining's projector with log C_p of each prototype in its logits."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..._checks import at_least
from ...head import PrototypeHead
from ...prototypes import LinearPrototypes

__all__ = ["DINOProjector"]

# Where stable-pretraining's projector, an nn.Sequential, has the parameters of this one.
_ORIGINAL = {f"{i}.{kind}": f"mlp.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")}
_ORIGINAL["6.weight"] = "last_layer.weight"


class DINOProjector(PrototypeHead):
    """stable-pretraining's projector of DINO, iBOT and DINOv2 with log C_p of each prototype in its logits.

    In place of `_build_dino_projector` and `_ibot_head`. Initialised as there, by torch's defaults: the norms start
    from 0.58 and kappa from 5.8 at temperature 0.1. Parameters are `mlp.0`, `mlp.2`, `mlp.4` and `last_layer.weight`
    (K, p); a state dict with the original's `0`, `2`, `4` and `6.weight` loads.

    Args:
        in_dim: dimension of the backbone's features.
        hidden_dim: width of the hidden layers.
        bottleneck_dim: dimension p of the sphere's space, >= 2.
        n_prototypes: number of prototypes K.
        temperature: as in `VMFPrototypeHead`; the `attach` of the losses sets it.
        normalizer: as in `VMFPrototypeHead`.

    Shape: (..., in_dim) to (..., K), in float32.

    Raises:
        ValueError, TypeError: an argument is out of its range.

    >>> import torch
    >>> from vmf_heads.compat.stable_pretraining import DINOProjector
    >>> DINOProjector(32, 16, 8, 100)(torch.randn(4, 32)).shape
    torch.Size([4, 100])
    """

    def __init__(
        self,
        in_dim: int,
        hidden_dim: int,
        bottleneck_dim: int,
        n_prototypes: int,
        *,
        temperature: float = 0.1,
        normalizer: str = "vmf",
    ) -> None:
        at_least("in_dim", in_dim, 1)
        at_least("hidden_dim", hidden_dim, 1)
        mlp = nn.Sequential(
            nn.Linear(in_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, at_least("bottleneck_dim", bottleneck_dim, 2)),
        )
        prototypes = LinearPrototypes(bottleneck_dim, at_least("n_prototypes", n_prototypes, 1))
        super().__init__(in_dim, mlp, prototypes, temperature=temperature, normalizer=normalizer)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for original, name in _ORIGINAL.items():
            if prefix + original in state_dict:
                state_dict[prefix + name] = state_dict.pop(prefix + original)
        super()._load_from_state_dict(state_dict, prefix, *args)
