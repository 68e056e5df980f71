"""An MLP that begins as an isometry: a linear map that keeps the directions of its inputs, in spite of its activations.

A random MLP with GELU does not: its activations add much the same to every row, and images come out more alike than
they went in. Here units stand in pairs. The input of one is the negative of the other's, and the layer behind them
reads their difference, which for GELU, ReLU and SiLU is the input itself::

    act(z) - act(-z) = z

So the MLP is the projection onto the first principal directions of the features, as long as nothing has been learnt.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .._distributed import all_reduce_sum_

_NORMS = (nn.BatchNorm1d, nn.SyncBatchNorm, nn.LayerNorm)  # of z and -z they make u and -u, in training


def make_isometric_(
    mlp: nn.Module, features: Tensor, generator: torch.Generator, process_group: dist.ProcessGroup | None
) -> None:
    """Set all weights of `mlp` so that it maps x to the first principal coordinates of x - mean of `features`.

    `mlp` is a linear layer or a sequence of linear layers, with activations and normalisations between them, that ends
    in p units. Where it has narrow layers, p < in_dim among them, the principal directions of largest variance stay.
    Hidden layers hold them in a random orthogonal basis, with a mean square of 1. LayerNorm keeps directions, too;
    BatchNorm keeps them about, as it scales each of the basis' coordinates by its deviation. Without a bias in the
    first layer, and without BatchNorm, nothing can subtract the mean, and directions are those of x.

    Raises ValueError if `mlp` is not built like that, or if the rows of `features` are all the same.
    """
    layers = _layers(mlp)
    linears = [layer for layer in layers if isinstance(layer, nn.Linear)]
    batch_norm = len(layers) > 1 and isinstance(layers[1], (nn.BatchNorm1d, nn.SyncBatchNorm))
    subtracts = linears[0].bias is not None or batch_norm
    mean, spread, directions = _principal(features, subtracts, process_group)
    halves = [linear.out_features // 2 for linear in linears[:-1]]
    kept = min(len(spread), *halves) if halves else len(spread)
    if not kept:
        raise ValueError("`mlp` (='isometric') needs a head whose hidden layers have at least two units")
    if not spread[:kept].sum() > 1e-12 * mean.square().sum():  # what rounding leaves of equal rows
        raise ValueError("`features` must have rows that differ, but all of them are the same")
    for layer in layers:
        if isinstance(layer, _NORMS):
            layer.reset_parameters()
    # `coordinates` @ (input of a layer) are the principal coordinates (kept,).
    coordinates = directions[:, :kept].T
    if halves:
        coordinates = coordinates * (halves[0] / spread[:kept].sum()).sqrt()
    for linear, half in zip(linears, [*halves, 0], strict=True):
        if linear is linears[-1]:
            weight = coordinates.new_zeros(linear.out_features, linear.in_features)
            weight[:kept] = coordinates[: len(weight)]
        else:
            basis = _orthonormal_columns(half, kept, generator).to(coordinates)
            rows = basis @ coordinates
            weight = linear.weight.to(rows)  # a unit that is left over from the pairs keeps its inputs
            weight[: 2 * half] = torch.cat([rows, -rows])
            coordinates = coordinates.new_zeros(kept, linear.out_features)
            coordinates[:, : 2 * half] = torch.cat([basis, -basis]).T
        linear.weight.copy_(weight)
        if linear.bias is not None:
            linear.bias.copy_(-(weight @ mean) if linear is linears[0] else torch.zeros_like(linear.bias))


def _layers(mlp: nn.Module) -> Sequence[nn.Module]:
    """The layers of `mlp` in order: linear ones at both ends, and what may stand between them."""
    layers = list(mlp) if isinstance(mlp, nn.Sequential) else [mlp]
    z = torch.linspace(-3, 3, 13, dtype=torch.float64)
    for number, layer in enumerate(layers):
        inner = 0 < number < len(layers) - 1
        if isinstance(layer, nn.Linear) or (inner and isinstance(layer, _NORMS)):
            continue
        if not inner or any(True for _ in layer.parameters()) or not torch.allclose(layer(z) - layer(-z), z):
            raise ValueError(
                "`mlp` (='isometric') needs a head of linear layers with BatchNorm or LayerNorm and activations for "
                f"which act(z) - act(-z) = z, such as GELU, ReLU or SiLU, between them, and here is a "
                f"{type(layer).__name__}; mlp='keep' takes any head"
            )
    return layers


def _principal(
    features: Tensor, subtract_mean: bool, process_group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (D,), variances (D,) in descending order and their directions as columns (D, D), in float64."""
    dim = features.shape[1]
    sums = torch.zeros(dim + 1, dim + 1, dtype=torch.float64, device=features.device)
    for chunk in features.split(4096):
        rows = torch.cat([chunk.double(), chunk.new_ones(len(chunk), 1, dtype=torch.float64)], dim=1)
        sums += rows.T @ rows
    all_reduce_sum_(sums, process_group)
    sums /= sums[-1, -1].clone()
    mean = sums[-1, :-1] if subtract_mean else torch.zeros_like(sums[-1, :-1])
    variances, directions = torch.linalg.eigh(sums[:-1, :-1] - mean.outer(mean))
    return mean, variances.flip(0).clamp(min=0), directions.flip(1)


def _orthonormal_columns(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """A random matrix (rows >= columns, columns) with orthonormal columns."""
    return torch.linalg.qr(torch.randn(rows, columns, dtype=torch.float64, generator=generator))[0]
