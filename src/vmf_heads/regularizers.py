"""Regularisers of prototypes, experimental: what keeps them from becoming copies of one another."""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import positive
from ._matmul import at_least_float32, without_autocast
from ._memory import rows_per_chunk

__all__ = ["prototype_koleo"]


def prototype_koleo(directions: Tensor, *, floor: float = 1e-4) -> Tensor:
    """KoLeo on the directions of prototypes: small where each is far from its nearest neighbour. Experimental.

    With u_k = v_k / ||v_k|| and n(k) the nearest other prototype, it is the Kozachenko-Leonenko estimate of the
    differential entropy of the directions, up to a constant and a factor, with its sign changed::

        L = -1/K sum_k log sqrt(||u_k - u_n(k)||^2 + floor^2)

    Equals, without a tensor (K, K)::

        u = torch.nn.functional.normalize(directions, dim=1)
        squares = (u[:, None] - u[None]).square().sum(dim=2)
        squares.fill_diagonal_(torch.inf)
        loss = -(squares.amin(dim=1) + floor**2).log().mean() / 2

    The gradient is orthogonal to every v_k, so norms, and with them kappa, stay free. A pair of neighbours adds at most
    1 / (2 K floor ||v_k||) to it, and nothing where they are equal: nothing says which way they should part. A single
    prototype has no neighbour, and the value 0. Which one is the nearest is decided by cosines: in float32 it may be
    any of those at distances below 0.0005.

    Add it to a loss with a small weight. Where the prototypes belong to a model in DistributedDataParallel or FSDP2,
    take them from the output of its forward, so that their gradient is right::

        output = student_head(features)  # of a head with output="prototypes": a `HeadOutput`
        loss = loss + 0.1 * prototype_koleo(output.directions)

    Args:
        directions: v (K, p), of any length: `HeadOutput.directions`, `head.last_layer.weight_v`, or prototypes w
            themselves. A row that is 0 counts as the point 0, and has the gradient of a row of length 1.
        floor: a distance, > 0; below it neighbours are pushed apart less, and not more, the nearer they are.

    Returns:
        L, a scalar in float32, or float64 for float64 directions. It takes K^2 p multiplications, of which the gradient
        repeats none, and memory for a few (K, p).

    Raises:
        TypeError: `directions` is not a floating tensor.
        ValueError: `directions` is not of shape (K >= 1, p), or `floor` not > 0.
        RuntimeError: the prototypes are cut over ranks (`vmf_heads.parallel`), so that no rank can find neighbours.

    Reference: Govindarajan, Sidén, Roll and Lindsten, "On partial prototype collapse in the DINO family of
    self-supervised methods", BMVC 2024, arXiv 2410.14060. KoLeo is that of Sablayrolles et al., "Spreading vectors for
    similarity search", ICLR 2019. Neither has the floor.

    >>> import torch
    >>> from vmf_heads.regularizers import prototype_koleo
    >>> bunched = torch.tensor([[1.0, 0.0], [1.0, 0.1], [-1.0, 0.0]])
    >>> spread = torch.tensor([[1.0, 0.0], [-0.5, 0.87], [-0.5, -0.87]])
    >>> bool(prototype_koleo(bunched) > prototype_koleo(spread))
    True
    """
    if not isinstance(directions, Tensor) or not directions.is_floating_point():
        got = directions.dtype if isinstance(directions, Tensor) else type(directions).__name__
        raise TypeError(f"`directions` (of {got}) must be a floating tensor")
    if directions.dim() != 2 or not len(directions):
        raise ValueError(f"`directions` (of shape {tuple(directions.shape)}) must have shape (K >= 1, p)")
    positive("floor", floor)
    if hasattr(directions, "placements"):
        raise RuntimeError(
            "`directions` must be whole, and here they are cut over ranks: no rank can find the nearest prototypes"
        )
    v = at_least_float32(directions)
    length = torch.linalg.vector_norm(v, dim=1, keepdim=True)
    u = v / torch.where(length > 0, length, 1)  # 0 / 0 would be NaN
    if len(u) == 1:
        return u.sum() * 0
    squares = (u - u[nearest(u.detach())]).square().sum(dim=1)
    return -(squares + floor**2).log().mean() / 2


def nearest(u: Tensor) -> Tensor:
    """The index (K,) of the nearest other row of each of at least two unit vectors (K, p); no (K, K) exists."""
    found = []
    with without_autocast(u.device):
        start = 0
        for rows in u.split(rows_per_chunk(len(u), u.device)):
            cosine = rows @ u.T
            cosine.diagonal(start).fill_(-torch.inf)  # the row itself
            found.append(cosine.argmax(dim=1))
            start += len(rows)
    return torch.cat(found)
