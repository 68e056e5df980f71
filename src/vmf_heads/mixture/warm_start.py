"""A head whose prototypes are a mixture fitted to a backbone's features, so that pretraining can go on."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .._checks import at_least, one_of, positive
from .._distributed import all_reduce_sum_, is_sharded
from ..head import PrototypeHead, find_head
from ..prototypes import PrototypeLayer, Prototypes
from ._isometric import make_isometric_
from .distribution import VMFMixture
from .fit import MixtureFit, fit_vmf_mixture

__all__ = ["warm_start_"]

MLPS = ("isometric", "keep")
ROWS_AT_ONCE = 4096


@torch.no_grad()
def warm_start_(
    head: nn.Module,
    features: Tensor,
    *,
    mlp: str = "isometric",
    median_kappa: float | None = None,
    temperature: float | None = None,
    max_iterations: int = 50,
    seed: int = 0,
    process_group: dist.ProcessGroup | None = None,
) -> MixtureFit:
    """Make the prototypes of `head` the mixture that fits what its MLP makes of a backbone's features, in place.

    Equals, after the MLP was set as `mlp` says::

        fit = fit_vmf_mixture(head.features(features), K)
        fit.mixture.to_head(head)  # w = temperature * kappa * mu

    for a backbone that was published without its head. Pass the student, and give the teacher the same head as usual,
    `teacher.load_state_dict(student.state_dict())`.

    Args:
        head: a module with one prototype head inside, with whole parameters: call before DDP or FSDP wrap it.
        features: (N, in_dim) of the backbone, at least K rows, of images augmented as in training; of each rank its
            own under torch.distributed.
        mlp: "isometric" first sets the MLP so that it is, to begin with, the projection of x - mean onto the first p
            principal directions of `features`: units stand in pairs, and act(z) - act(-z) = z for GELU, ReLU and SiLU.
            "keep" leaves it, for an MLP that has been trained. A random one works, too, but its activations add much
            the same to every row, so that all features share a direction, and scores differ little.
        median_kappa: multiply all kappa by one factor, so that this is their median; None keeps those of the fit. They
            may be far above 1 / temperature, where DINO begins. Two views of an image that the fit puts into different
            components then cost about kappa * (1 - cosine) nats, and a norm of w that is large moves slowly under Adam.
            1 / temperature keeps the directions and the order of the kappa, and starts as soft as DINO does.
        temperature: tau of w; None is the head's own.
        max_iterations: passes of EM, at most.
        seed: of all random choices: the same arguments give the same head on the same machine.
        process_group: the ranks that make one head together; None: all of them, where torch.distributed runs.

    Returns:
        The `MixtureFit`, with kappa as fitted.

    A head whose norms are frozen, or that has no log C_p, cannot hold a mixture of different kappa. Its norms stay as
    they are, and it gets the directions alone. A head has no weights either. BatchNorm in the MLP works as the mode
    of the module says: in training mode by the statistics of some thousand rows at a time.

    Raises:
        TypeError: `features` is not a floating tensor.
        ValueError: an argument is out of its range, `features` are fewer than the prototypes, all the same or not
            finite, or an MLP cannot be made isometric; each message names the argument.
        RuntimeError: the head is sharded.

    >>> import torch
    >>> from vmf_heads import VMFPrototypeHead, prototype_report
    >>> from vmf_heads.mixture import warm_start_
    >>> _ = torch.manual_seed(0)
    >>> features = 3 + torch.randn(64, 40).repeat(20, 1) + 0.3 * torch.randn(1280, 40)  # 64 clusters
    >>> head = VMFPrototypeHead(40, 64, hidden_dim=80, bottleneck_dim=32)
    >>> before = prototype_report(head, head.features(features)).used
    >>> fit = warm_start_(head, features)
    >>> before < 32, prototype_report(head, head.features(features)).used
    (True, 64)
    """
    found = find_head(head, "head")
    one_of("mlp", mlp, MLPS)
    at_least("max_iterations", max_iterations, 1)
    if median_kappa is not None:
        positive("median_kappa", median_kappa)
    tau = found.temperature if temperature is None else positive("temperature", temperature)
    if found.last_layer.cut_over_ranks or any(is_sharded(parameter) for parameter in found.parameters()):
        raise RuntimeError("`head` must have whole parameters, and here they are sharded: call before it is wrapped")
    layer = found.last_layer
    _check_features(features, found.in_dim, layer.num_prototypes, process_group)

    generator = torch.Generator().manual_seed(seed)
    if mlp == "isometric":
        make_isometric_(found.get_submodule(found.MLP_NAME), features, generator, process_group)
    y = _projected(found, features, generator)
    fit = fit_vmf_mixture(
        y, layer.num_prototypes, max_iterations=max_iterations, seed=seed, process_group=process_group
    )
    kappa = fit.mixture.kappa
    if found.normalizer == "none" or _has_frozen_norms(layer):
        kappa = layer.norms.to(kappa) / tau
    elif median_kappa is not None:
        kappa = kappa * (median_kappa / kappa.median())
    VMFMixture(fit.mixture.weights, fit.mixture.directions, kappa).to_head(found, tau)
    return fit


def _has_frozen_norms(layer: PrototypeLayer) -> bool:
    """Whether the directions learn and the norms do not. In a teacher neither does, which says nothing."""
    return isinstance(layer, Prototypes) and layer.weight_v.requires_grad and not layer.weight_g.requires_grad


def _projected(head: PrototypeHead, features: Tensor, generator: torch.Generator) -> Tensor:
    """The unit features (N, p) in a random order, so that BatchNorm sees rows of all kinds together."""
    order = torch.randperm(len(features), generator=generator).to(features.device)
    parts = order.chunk(max(1, math.ceil(len(order) / ROWS_AT_ONCE)))
    like = next(head.parameters())
    return torch.cat([head.features(features[part].to(like)) for part in parts])


def _check_features(features: Tensor, in_dim: int, count: int, process_group: dist.ProcessGroup | None) -> None:
    if not isinstance(features, Tensor) or not features.is_floating_point():
        got = features.dtype if isinstance(features, Tensor) else type(features).__name__
        raise TypeError(f"`features` (of {got}) must be a floating tensor")
    if features.dim() != 2 or features.shape[1] != in_dim:
        raise ValueError(f"`features` (of shape {tuple(features.shape)}) must have shape (N, `in_dim` (={in_dim}))")
    if not features.isfinite().all():
        raise ValueError("`features` must be finite, but some are inf or NaN")
    rows = int(all_reduce_sum_(torch.tensor([len(features)], device=features.device), process_group))
    if rows < count:
        raise ValueError(f"`features` (of {rows} rows) must have at least a row for each of the {count} prototypes")
