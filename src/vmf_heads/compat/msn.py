"""MSN with vMF prototypes inside facebookresearch/msn: `init_msn_loss` with the original's name and arguments.

Experimental: the paper has DINO and iBOT only. The change to src/msn_train.py::

    -from src.losses import init_msn_loss
    +from vmf_heads.compat.msn import init_msn_loss

MSN has one set of prototypes for anchors and targets, the same temperature for both, and me-max instead of a centre.
Its predictions normalise the prototypes; here they keep their norms and each takes its log C_p along (Eq. 6). Eq. 7's
centre and Eq. 9 have no counterpart. The prototypes stay the tensor that the training script owns, saves and
all-reduces the gradient of.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from .._checks import at_least, positive
from .._distributed import all_reduce_sum_
from .._matmul import at_least_float32, without_autocast
from ..prototypes import prototype_log_normalizer
from ._sinkhorn import sinkhorn_knopp

__all__ = ["init_msn_loss"]


class MSNLoss(Protocol):
    """What `init_msn_loss` returns."""

    def __call__(
        self,
        anchor_views: Tensor,
        target_views: Tensor,
        prototypes: Tensor,
        proto_labels: Tensor,
        T: float = 0.25,
        use_entropy: bool = False,
        use_sinkhorn: bool = False,
    ) -> tuple:
        """(loss, me-max, entropy, log[, targets])."""


def init_msn_loss(num_views: int = 1, tau: float = 0.1, me_max: bool = True, return_preds: bool = False) -> MSNLoss:
    """MSN's loss function for prototypes of any norm.

    Equals, for anchors a, targets b, prototypes w and labels L, in probabilities instead of logarithms::

        p(y) = softmax(normalize(y) @ w.T / tau + log C_p(||w|| / tau)) @ L
        t = p(b) ** (1 / T); t = t / t.sum(dim=1)            # sharpened; the same for each of the num_views anchors
        loss = -(t * log(p(a))).sum(dim=1).mean()
        me_max = log(K) - entropy(mean of p(a) over the batch and all ranks)

    With prototypes of norm 1 it is MSN's own loss for any prototypes, which MSN normalises itself.

    Args:
        num_views: anchor views per image.
        tau: the temperature of anchors and targets.
        me_max: whether to return the regulariser; 0 otherwise.
        return_preds: whether the function returns the targets, too.

    Returns:
        A function of anchor_views (num_views * B, p), view by view; target_views (B, p); prototypes (K, p);
        proto_labels (K, C), MSN's one-hot rows, smoothed or not; T, the sharpening; use_entropy; use_sinkhorn. It gives
        (loss, me-max, entropy of the anchors' predictions or 0, {"np", "max_t", "min_t"}[, targets (num_views * B, C)])
        in float32. MSN's arguments `sharpen` and `snn` are missing: those work on probabilities, this in log space,
        where no prediction underflows (with one-hot labels; smoothed ones have a floor of their own).

    Raises:
        ValueError: an argument is out of its range or a shape does not fit.

    Reference: Assran et al., ECCV 2022, for the loss; Govindarajan et al., ICLR 2023, Eq. 6, for the prediction.

    >>> import torch
    >>> from vmf_heads.compat.msn import init_msn_loss
    >>> msn = init_msn_loss(num_views=2, return_preds=True)
    >>> anchors, targets = torch.randn(2 * 5, 16), torch.randn(5, 16)
    >>> prototypes = torch.nn.Parameter(torch.randn(8, 16))
    >>> ploss, me_max, ent, logs, t = msn(anchors, targets, prototypes, proto_labels=torch.eye(8))
    >>> (ploss + me_max).backward()
    >>> prototypes.grad.shape, t.shape
    (torch.Size([8, 16]), torch.Size([10, 8]))
    """
    at_least("num_views", num_views, 1)
    positive("tau", tau)

    def loss(
        anchor_views: Tensor,
        target_views: Tensor,
        prototypes: Tensor,
        proto_labels: Tensor,
        T: float = 0.25,
        use_entropy: bool = False,
        use_sinkhorn: bool = False,
    ) -> tuple:
        positive("T", T)
        _check_shapes(anchor_views, target_views, prototypes, proto_labels, num_views)
        log_probs = _log_predictions(anchor_views, prototypes, proto_labels, tau)
        with torch.no_grad():
            sharpened = torch.log_softmax(_log_predictions(target_views, prototypes, proto_labels, tau) / T, dim=1)
            targets = (sinkhorn_knopp(sharpened) if use_sinkhorn else sharpened.exp()).repeat(num_views, 1)
        ploss = -(targets * log_probs).sum(dim=1).mean()
        rloss = _me_max(log_probs) if me_max else 0.0
        sloss = -(log_probs.exp() * log_probs).sum(dim=1).mean() if use_entropy else 0.0
        largest, index = targets.max(dim=1)
        logs = {"np": float(len(index.unique())), "max_t": largest.mean(), "min_t": targets.min(dim=1).values.mean()}
        return (ploss, rloss, sloss, logs, targets) if return_preds else (ploss, rloss, sloss, logs)

    return loss


def _log_predictions(views: Tensor, prototypes: Tensor, labels: Tensor, tau: float) -> Tensor:
    """log p (N, C), Eq. 6 of the prototypes summed by their labels."""
    with without_autocast(views.device):
        w = at_least_float32(prototypes)
        y = F.normalize(at_least_float32(views), dim=1)
        log_c = prototype_log_normalizer(torch.linalg.vector_norm(w, dim=1), w.shape[1], tau)
        log_posterior = torch.log_softmax(y @ w.T / tau + log_c, dim=1)
        if torch.equal(labels, torch.eye(*labels.shape, dtype=labels.dtype, device=labels.device)):
            return log_posterior
        # Smoothed labels keep every sum above smoothing / C; without them a class may be too improbable for float32.
        sums = log_posterior.exp() @ labels.to(w.dtype)
        return sums.clamp(min=torch.finfo(w.dtype).tiny).log()


def _me_max(log_probs: Tensor) -> Tensor:
    """log C - entropy of the mean prediction over all ranks."""
    log_mean = torch.logsumexp(log_probs, dim=0) - math.log(len(log_probs))
    sums = torch.cat([log_mean.detach().double().exp(), log_mean.new_ones(1, dtype=torch.float64)])
    all_reduce_sum_(sums)
    log_global = (sums[:-1] / sums[-1]).clamp(min=torch.finfo(torch.float64).tiny).log().to(log_mean.dtype)
    value = (log_global.exp() * log_global).sum() + math.log(len(log_global))
    # As in MSN the gradient is that of the global mean with respect to this rank's, which DDP averages over the ranks.
    mean = log_mean.exp()
    return value + ((log_global + 1) * (mean - mean.detach())).sum()


def _check_shapes(anchors: Tensor, targets: Tensor, prototypes: Tensor, labels: Tensor, num_views: int) -> None:
    if prototypes.dim() != 2 or prototypes.shape[1] < 2:
        raise ValueError(f"`prototypes` (of shape {tuple(prototypes.shape)}) must be (K, p) with p >= 2")
    if labels.dim() != 2 or len(labels) != len(prototypes):
        raise ValueError(
            f"`proto_labels` (of shape {tuple(labels.shape)}) must have a row for each of the K "
            f"(={len(prototypes)}) rows of `prototypes`"
        )
    p = prototypes.shape[1]
    if len(targets) == 0:
        raise ValueError(f"`target_views` (of shape {tuple(targets.shape)}) must hold at least one image")
    for name, views in (("anchor_views", anchors), ("target_views", targets)):
        if views.dim() != 2 or views.shape[1] != p:
            raise ValueError(f"`{name}` (of shape {tuple(views.shape)}) must be (N, p) with p (={p}) of `prototypes`")
    if len(anchors) != num_views * len(targets):
        raise ValueError(
            f"`anchor_views` (of {len(anchors)} rows) must have `num_views` (={num_views}) rows for each of the "
            f"{len(targets)} rows of `target_views`"
        )
