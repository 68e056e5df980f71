"""lightly's projection heads of DINO and DINOv2."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from ..._checks import at_least
from ...head import PrototypeHead
from ...mlp import projection_mlp
from ...prototypes import Prototypes


class DINOv2ProjectionHead(PrototypeHead):
    """lightly's DINOv2 head with log C_p of each prototype in its logits; see `VMFPrototypeHead`.

    Parameter names, their order and their shapes are lightly's: `layers.*` for the MLP (its hidden layers have no
    biases with `batch_norm`), then `last_layer.weight_g` and `last_layer.weight_v`. As there, the norms always learn.

    Args:
        input_dim: dimension of the backbone's features.
        hidden_dim: width of the hidden layers.
        bottleneck_dim: dimension p of the sphere's space.
        output_dim: number of prototypes K.
        batch_norm: batch normalisation after the hidden layers.
        temperature: as in `VMFPrototypeHead`; the `attach` of the losses sets it.
        normalizer: as in `VMFPrototypeHead`.

    Shape: (..., input_dim) to (..., output_dim), in float32.

    Raises:
        ValueError, TypeError: an argument is out of its range.
    """

    MLP_NAME: ClassVar[str] = "layers"
    last_layer: Prototypes

    def __init__(
        self,
        input_dim: int = 2048,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        output_dim: int = 65536,
        batch_norm: bool = False,
        *,
        temperature: float = 0.1,
        normalizer: str = "vmf",
    ) -> None:
        at_least("input_dim", input_dim, 1)  # lightly's names, not those of the head below
        at_least("output_dim", output_dim, 1)
        mlp = projection_mlp(
            input_dim,
            hidden_dim,
            bottleneck_dim,
            norm=(lambda: nn.BatchNorm1d(hidden_dim)) if batch_norm else None,
            hidden_bias=not batch_norm,
        )
        prototypes = Prototypes(bottleneck_dim, output_dim)
        super().__init__(input_dim, mlp, prototypes, temperature=temperature, normalizer=normalizer)


class DINOProjectionHead(DINOv2ProjectionHead):
    """lightly's DINO head with log C_p of each prototype in its logits; see `DINOv2ProjectionHead`.

    Args:
        input_dim: dimension of the backbone's features.
        hidden_dim: width of the hidden layers.
        bottleneck_dim: dimension p of the sphere's space.
        output_dim: number of prototypes K.
        batch_norm: batch normalisation after the hidden layers.
        freeze_last_layer: the number of epochs in which `cancel_last_layer_gradients` does so.
        norm_last_layer: freeze the prototype norms at 1. False by default, unlike lightly's.
        temperature: as in `VMFPrototypeHead`; the `attach` of the losses sets it.
        normalizer: as in `VMFPrototypeHead`.

    >>> import torch
    >>> from vmf_heads.compat.lightly import DINOProjectionHead
    >>> head = DINOProjectionHead(32, 16, 8, 100)
    >>> head(torch.randn(4, 32)).shape, [name for name, _ in head.named_parameters()][-2:]
    (torch.Size([4, 100]), ['last_layer.weight_g', 'last_layer.weight_v'])
    """

    def __init__(
        self,
        input_dim: int = 2048,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        output_dim: int = 65536,
        batch_norm: bool = False,
        freeze_last_layer: int = -1,
        norm_last_layer: bool = False,
        *,
        temperature: float = 0.1,
        normalizer: str = "vmf",
    ) -> None:
        super().__init__(
            input_dim,
            hidden_dim,
            bottleneck_dim,
            output_dim,
            batch_norm,
            temperature=temperature,
            normalizer=normalizer,
        )
        self.freeze_last_layer = freeze_last_layer
        self.last_layer.weight_g.requires_grad = not norm_last_layer

    def cancel_last_layer_gradients(self, current_epoch: int) -> None:
        """Drop the gradients of the prototypes in the first `freeze_last_layer` epochs; call it after backward()."""
        if current_epoch < self.freeze_last_layer:
            for parameter in self.last_layer.parameters():
                parameter.grad = None
