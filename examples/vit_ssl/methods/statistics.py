"""Numbers that show whether a run learns: entropies of targets and centres, and concentrations of prototypes."""

from __future__ import annotations

import torch
from torch import Tensor

from vmf_heads.centering import Centering
from vmf_heads.teacher import TargetSummary

KAPPA_QUANTILES = {"kappa_min": 0.0, "kappa_p05": 0.05, "kappa_p50": 0.5, "kappa_p95": 0.95, "kappa_max": 1.0}


def target_statistics(targets: Tensor | TargetSummary, loss: Tensor) -> dict[str, Tensor]:
    """Return the entropies in nats of the teacher's targets (N, K), whose cross-entropy with the student is `loss`.

    A loss may hand over a summary of the targets instead of them.
    `target_entropy` is their mean entropy (ln K: every target is uniform), `marginal_entropy` that of their mean (0:
    all images share one prototype), `kl` = loss - target_entropy the mean KL(target || student). A run that learns has
    a target entropy well below its marginal entropy; in a collapsed one they are equal. `prototypes_used` is the
    number of prototypes that are the largest of some target.
    """
    targets = targets if isinstance(targets, TargetSummary) else TargetSummary.of(targets)
    return {
        "target_entropy": targets.entropy,
        "marginal_entropy": targets.marginal_entropy,
        "kl": loss - targets.entropy,
        "prototypes_used": targets.used,
    }


def kappa_statistics(kappa: Tensor) -> dict[str, Tensor]:
    """Return the quantiles over the prototypes of their concentrations kappa = ||w|| / student_temp, (K,)."""
    quantiles = torch.quantile(kappa, kappa.new_tensor(list(KAPPA_QUANTILES.values())))
    return dict(zip(KAPPA_QUANTILES, quantiles, strict=True))


def center_entropy(centering: Centering, temperature: float) -> Tensor:
    """Return the entropy in nats of a centre, as the mean assignment that it stands for at this teacher temperature.

    It is that of softmax(log_center), or of softmax(center / temperature) for a centre of logits: ln K where all
    prototypes are equally likely, 0 where one takes all.
    """
    return torch.special.entr(centering.offset(temperature).softmax(0)).sum()
