"""The MLP in front of the prototypes, with DINO's layers and initialisation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ._checks import at_least

__all__ = ["projection_mlp"]


def projection_mlp(
    in_dim: int,
    hidden_dim: int,
    bottleneck_dim: int,
    nlayers: int = 3,
    *,
    norm: Callable[[], nn.Module] | None = None,
    act: Callable[[], nn.Module] = nn.GELU,
    hidden_bias: bool = True,
    out_bias: bool = True,
) -> nn.Module:
    """DINO's projection MLP: linear layers with an activation after each but the last, weights normal with deviation
    0.02 (truncated at 2) and biases 0.

    Args:
        in_dim: dimension of the backbone's features.
        hidden_dim: width of the hidden layers.
        bottleneck_dim: dimension p of the sphere's space, >= 2.
        nlayers: number of linear layers; with 1 the MLP is that one layer.
        norm: makes the normalisation before each activation; None for none.
        act: makes each activation.
        hidden_bias: whether the hidden layers have biases.
        out_bias: whether the last layer has one.

    Returns:
        A `nn.Sequential`, or a `nn.Linear` for nlayers=1, with the submodule names of DINO's `mlp`.

    Raises:
        ValueError, TypeError: a number is not an integer in its range.

    Reference: Caron et al., ICCV 2021.

    >>> import torch
    >>> from vmf_heads.mlp import projection_mlp
    >>> projection_mlp(384, 64, 16)(torch.randn(2, 384)).shape
    torch.Size([2, 16])
    """
    at_least("in_dim", in_dim, 1)
    at_least("nlayers", nlayers, 1)
    at_least("hidden_dim", hidden_dim, 1)
    at_least("bottleneck_dim", bottleneck_dim, 2)
    layers: list[nn.Module] = []
    width = in_dim
    for _ in range(nlayers - 1):
        layers += [nn.Linear(width, hidden_dim, bias=hidden_bias), *([] if norm is None else [norm()]), act()]
        width = hidden_dim
    last = nn.Linear(width, bottleneck_dim, bias=out_bias)
    mlp = nn.Sequential(*layers, last) if layers else last
    for module in mlp.modules():
        if type(module) is nn.Linear:
            # Not constructed as one: DINO's code draws PyTorch's initialisation of all layers first, and its random
            # numbers for a seed are ours.
            module.__class__ = DINOLinear
            module.reset_parameters()
    return mlp


class DINOLinear(nn.Linear):
    """A linear layer that `reset_parameters` initialises as DINO does."""

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Weights normal with deviation 0.02, truncated at 2, and biases 0."""
        nn.init.trunc_normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
