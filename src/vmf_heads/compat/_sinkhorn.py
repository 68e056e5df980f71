"""Sinkhorn-Knopp in log space: assignments of samples to prototypes that use every prototype equally."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .._checks import at_least
from .._distributed import all_reduce_sum_


@torch.no_grad()
def sinkhorn_knopp(logits: Tensor, n_iterations: int = 3, process_group: dist.ProcessGroup | None = None) -> Tensor:
    """Assignments (N, K) from logits (N, K), already divided by the temperature; each row sums to 1.

    Equals, where nothing over- or underflows, what SwAV, MSN, DINOv2 and DINOv3 do with Q = exp(logits): divide every
    column by its sum over the samples of all ranks, every row by its sum, `n_iterations` times. Here as two vectors of
    offsets, so that no size of the logits overflows: with u_k = log sum_n exp(logits_nk - v_n) and v_n at first 0, then
    log sum_k exp(logits_nk - u_k), the assignments are softmax_k(logits_nk - u_k). The numbers of samples and
    prototypes, and the sum of Q, cancel.

    The first u_k takes with it any constant that was added to a prototype's logits: log C_p of a teacher whose raw
    logits come here, as in DINOv2 and DINOv3, has no effect at all. (MSN's targets come after a softmax.)
    """
    at_least("n_iterations", n_iterations, 1)
    u = _logsumexp_over_ranks(torch.logsumexp(logits, dim=0), process_group)
    for _ in range(n_iterations - 1):
        v = torch.logsumexp(logits - u, dim=1, keepdim=True)
        u = _logsumexp_over_ranks(torch.logsumexp(logits - v, dim=0), process_group)
    return torch.softmax(logits - u, dim=1)


def _logsumexp_over_ranks(local: Tensor, process_group: dist.ProcessGroup | None) -> Tensor:
    if not (dist.is_available() and dist.is_initialized()):
        return local
    largest = local.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=process_group)
    return largest + all_reduce_sum_((local - largest).exp(), process_group).log()
