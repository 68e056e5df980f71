"""A learning rate of their own for the prototypes' norms, which are what becomes the concentrations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from ._checks import positive
from .prototypes import Prototypes

__all__ = ["separate_norms"]


def separate_norms(
    groups: Iterable[Tensor] | Iterable[dict[str, Any]],
    module: nn.Module,
    *,
    lr: float,
    lr_multiplier: float = 10.0,
) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser in which the norms of `module`'s prototypes learn faster and do not decay.

    Equals, for one group of all parameters::

        norms = head.last_layer.weight_g
        rest = [parameter for parameter in module.parameters() if parameter is not norms]
        [{"params": rest}, {"params": [norms], "lr": lr * lr_multiplier, "weight_decay": 0.0}]

    AdamW moves a parameter by about its learning rate in a step, and by less where gradients change their sign. A norm
    that starts at 1 therefore stays near 1 in a short training, every kappa near 1 / temperature, and the normalising
    constant has nothing to say.

    A training loop that sets the learning rate of every group in each step (DINO's does) must multiply::

        group["lr"] = lr_schedule[it] * group.get("lr_multiplier", 1.0)

    DINOv2's loop does so already: the names in the new group are those of its own.

    Args:
        groups: parameters, or the groups that your optimiser would get; they are not changed.
        module: model with prototypes, through DDP, FSDP2 and compile wrappers.
        lr: learning rate of the parameters, and of groups that do not name their own, > 0.
        lr_multiplier: the norms' learning rate over that of the group they come from, > 0.

    Returns:
        The groups without the norms, in order, then one group of the norms for each group that had any.

    Raises:
        ValueError: `module` has no prototypes, or none of their norms that can be trained is in `groups`.

    Reference:
        docs/evidence.md, "kappa that can move".

    >>> import torch
    >>> from vmf_heads import VMFPrototypeHead
    >>> from vmf_heads.optim import separate_norms
    >>> head = VMFPrototypeHead(8, 32, hidden_dim=8, bottleneck_dim=4)
    >>> optimizer = torch.optim.AdamW(separate_norms(head.parameters(), head, lr=1e-3), lr=1e-3)
    """
    positive("lr", lr)
    positive("lr_multiplier", lr_multiplier)
    norms = {id(layer.weight_g) for layer in module.modules() if isinstance(layer, Prototypes)}
    if not norms:
        raise ValueError(f"`module` (a {type(module).__name__}) must contain the prototypes of a head")
    others, separate = [], []
    for group in _as_groups(groups):
        found = [parameter for parameter in group["params"] if id(parameter) in norms and parameter.requires_grad]
        others.append(group | {"params": [x for x in group["params"] if not any(x is norm for norm in found)]})
        if found:
            own = {"params": found, "lr": group.get("lr", lr) * lr_multiplier, "weight_decay": 0.0}
            separate.append(group | own | {"lr_multiplier": lr_multiplier, "wd_multiplier": 0.0})
    if not separate:
        raise ValueError("`groups` must hold the norms (`last_layer.weight_g`) of `module`, and they must require grad")
    return others + separate


def _as_groups(groups: Iterable[Tensor] | Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """As an optimiser reads them: dictionaries, or the parameters of one."""
    listed = list(groups)
    if all(isinstance(group, dict) for group in listed):
        return [group | {"params": _listed(group["params"])} for group in listed]  # type: ignore[operator, index]
    return [{"params": listed}]


def _listed(params: Tensor | Iterable[Tensor]) -> list[Tensor]:
    """The parameters of a group, which may be a single one (DINOv2 makes such groups)."""
    return [params] if isinstance(params, Tensor) else list(params)
