"""From DINO-vMF back to plain DINO. (The other way needs no function: docs/migrating.md.)"""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import positive
from ..head import VMFPrototypeHead

__all__ = ["logit_center"]


@torch.no_grad()
def logit_center(
    log_center: Tensor, teacher_head: VMFPrototypeHead, teacher_temperature: float, *, norms: Tensor | None = None
) -> Tensor:
    """The `center` (1, K) with which plain DINO has DINO-vMF's teacher targets at this temperature, exactly.

    Equals teacher_temperature * (log_center - log C_p(||w|| / teacher_temperature)) up to a constant: DINO subtracts
    its centre inside the temperature, so the centre can carry the teacher's log C_p. The student's log C_p has no
    place in plain DINO and is lost. The head's own state dict is a plain DINO head's as it is.

    Args:
        log_center: c (K,) of Eq. 9, from the state dict of the loss.
        teacher_head: the teacher's head.
        teacher_temperature: tau_t at this moment of training, > 0.
        norms: ||w_k|| (K,) of the prototypes that the centre belongs to, if those are not `teacher_head.last_layer`
            (iBOT's patches: `teacher_head.last_layer2.norms`, and `center2` is the result's [None]).

    Raises ValueError if the temperature is not > 0 or `log_center` and the prototypes differ in number.

    Reference: Govindarajan et al., ICLR 2023, Eq. 7 and Eq. 8.

    >>> import torch
    >>> from vmf_heads.compat.convert import logit_center
    >>> from vmf_heads.compat.dino import DINOHead
    >>> logit_center(torch.zeros(32), DINOHead(16, 32), teacher_temperature=0.04).shape
    torch.Size([1, 32])
    """
    norms = teacher_head.last_layer.norms if norms is None else norms
    if log_center.shape != norms.shape:
        raise ValueError(
            f"`log_center` (of shape {tuple(log_center.shape)}) must be (K,) with K (={len(norms)}) the number of "
            "prototypes"
        )
    log_normalizer = teacher_head.log_normalizer(positive("teacher_temperature", teacher_temperature), norms)
    return (teacher_temperature * (log_center - log_normalizer)).unsqueeze(0)
