"""How the losses find the heads they work with, and what they ask of them."""

from __future__ import annotations

import warnings

from torch import nn

from .._distributed import is_sharded
from ..head import VMFPrototypeHead


def find_head(model: nn.Module, name: str) -> VMFPrototypeHead:
    """The one VMFPrototypeHead inside `model`, also through DDP, FSDP and compile wrappers.

    Raises ValueError if there is none or more than one.
    """
    heads = {path: m for path, m in model.named_modules() if isinstance(m, VMFPrototypeHead)}
    if len(heads) != 1:
        found = "none" if not heads else f"{len(heads)}: {', '.join(repr(path) for path in heads)}"
        raise ValueError(
            f"`{name}` (a {type(model).__name__}) must contain exactly one VMFPrototypeHead; it contains {found}"
        )
    return next(iter(heads.values()))


def warn_if_norms_are_frozen(head: VMFPrototypeHead) -> None:
    """DINO's default `norm_last_layer=True` freezes kappa, and the vMF normalisation then does nothing."""
    if head.normalizer == "vmf" and not head.last_layer.weight_g.requires_grad:
        warnings.warn(
            "the student's prototype norms are frozen (norm_last_layer=True): every kappa is 1/temperature and the vMF "
            "normalisation does nothing. Build the head with norm_last_layer=False (`--norm_last_layer false` in DINO)",
            UserWarning,
            stacklevel=3,
        )


def fused_output(student: nn.Module, head: VMFPrototypeHead) -> str:
    """The output that a fused loss asks of `head`: plain features, or a `HeadOutput` where those would not do.

    With plain features the loss reads the prototypes from the head, outside the model's forward. FSDP2 gives such a
    read silently wrong gradients, and DistributedDataParallel(find_unused_parameters=True) counts them as unused.
    """
    finds_unused = any(getattr(module, "find_unused_parameters", False) for module in student.modules())
    return "prototypes" if finds_unused or is_sharded(head.last_layer.weight_v) else "features"
