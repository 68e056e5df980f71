"""DINO-vMF inside lightly: `DINOProjectionHead` and `DINOLoss` with the original's names and signatures.

The change to a training script, such as lightly's examples/pytorch/dino.py::

    -from lightly.loss import DINOLoss
    -from lightly.models.modules import DINOProjectionHead
    +from vmf_heads.compat.lightly import DINOLoss, DINOProjectionHead

    +criterion.attach(model.student_head, model.teacher_head)   # after both are built

`norm_last_layer` defaults to False here (True in lightly): with frozen norms the vMF normalisation changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .._checks import at_least, one_of, positive
from .._matmul import at_least_float32
from ..head import VMFPrototypeHead
from ._centred import CentredLoss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["DINOLoss", "DINOProjectionHead"]


class DINOProjectionHead(VMFPrototypeHead):
    """lightly's DINO head with log C_p of each prototype in its logits; see `VMFPrototypeHead`.

    Parameter names, their order and their shapes are lightly's: `layers.*` for the MLP (its hidden layers have no
    biases with `batch_norm`), then `last_layer.weight_g` and `last_layer.weight_v`.

    Args:
        input_dim, hidden_dim, bottleneck_dim, output_dim: widths; `output_dim` is the number of prototypes K.
        batch_norm: batch normalisation after the hidden layers.
        freeze_last_layer: the number of epochs in which `cancel_last_layer_gradients` does so.
        norm_last_layer: freeze the prototype norms at 1. False by default, unlike lightly's.
        temperature, normalizer: as in `VMFPrototypeHead`; `DINOLoss.attach` sets the temperature.

    Shape: (..., input_dim) to (..., output_dim), in float32.

    Raises:
        ValueError, TypeError: an argument is out of its range.

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
        at_least("input_dim", input_dim, 1)  # lightly's names, not those of the head below
        at_least("output_dim", output_dim, 1)
        super().__init__(
            input_dim,
            output_dim,
            use_bn=batch_norm,
            norm_last_layer=norm_last_layer,
            hidden_dim=hidden_dim,
            bottleneck_dim=bottleneck_dim,
            temperature=temperature,
            normalizer=normalizer,
        )
        self.freeze_last_layer = freeze_last_layer
        if batch_norm:
            for linear in [m for m in self.mlp.modules() if isinstance(m, nn.Linear)][:-1]:
                linear.bias = None
        # The MLP is called `layers` and comes before the last layer, also in parameters().
        self._modules = {"layers": self._modules["mlp"], "last_layer": self._modules["last_layer"]}

    def _features(self, x: Tensor) -> Tensor:
        return self._normalized(self.layers, x)

    def cancel_last_layer_gradients(self, current_epoch: int) -> None:
        """Drop the gradients of the prototypes in the first `freeze_last_layer` epochs; call it after backward()."""
        if current_epoch < self.freeze_last_layer:
            for parameter in self.last_layer.parameters():
                parameter.grad = None
