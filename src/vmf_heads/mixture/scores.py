"""How unusual features are under a mixture, and which component they belong to."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._memory import rows_per_chunk
from .distribution import VMFMixture

__all__ = ["DensityScores", "density_scores"]


class DensityScores(NamedTuple):
    """What `density_scores` says of each row, all (...,)."""

    log_prob: Tensor  # nats; low for what the mixture has not seen
    component: Tensor  # the most probable one, int64
    kappa: Tensor  # of that component; the paper reads a high one as an image that is easy to classify
    responsibility: Tensor  # P(component | y), in [1/K, 1]


@torch.no_grad()
def density_scores(mixture: VMFMixture, y: Tensor) -> DensityScores:
    """Scores of difficulty and of being out of distribution, in chunks: no tensor (N, K) exists.

    Args:
        mixture: fitted to features of the data that count as usual.
        y: unit vectors (..., p) of the same encoder.

    Returns:
        `DensityScores`. -log_prob is a score that is large out of distribution.

    Raises:
        ValueError: `y` does not end in the mixture's dimension.

    Reference: Govindarajan et al., ICLR 2023, section 5.3 and Figure 2 (kappa of the winning component).

    >>> import torch
    >>> from vmf_heads.mixture import VMFMixture, density_scores
    >>> mixture = VMFMixture(torch.ones(2), torch.eye(3)[:2], torch.tensor([50.0, 5.0]))
    >>> scores = density_scores(mixture, torch.eye(3))
    >>> scores.component, scores.kappa
    (tensor([0, 1, 1]), tensor([50.,  5.,  5.]))
    >>> scores.log_prob.argmin()
    tensor(2)
    """
    rows = y.reshape(-1, y.shape[-1])
    found = []
    for chunk in rows.split(rows_per_chunk(mixture.num_components, y.device, buffers=2)):
        joint = mixture.log_joint(chunk)
        log_prob = joint.logsumexp(dim=1)
        best, component = joint.max(dim=1)
        found.append((log_prob, component, mixture.kappa[component], (best - log_prob).exp()))
    return DensityScores(*(torch.cat(parts).reshape(y.shape[:-1]) for parts in zip(*found, strict=True)))
