"""Sinkhorn-Knopp in log space: assignments of samples to prototypes that use every prototype equally."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import reduce

import torch
import torch.distributed as dist
from torch import Tensor

from .._checks import at_least
from .._distributed import all_reduce_sum_
from .._matmul import at_least_float32, linear_float32
from .._memory import rows_per_chunk
from ..prototypes import HeadOutput

Chunks = Callable[[], Iterable[Tensor]]  # every call gives the same logits (c, K), a few rows at a time


@torch.no_grad()
def sinkhorn_knopp(
    scores: Tensor,
    n_iterations: int = 3,
    process_group: dist.ProcessGroup | None = None,
    *,
    temperature: float = 1.0,
) -> Tensor:
    """Assignments (N, K) from the logits scores / temperature (N, K); each row sums to 1.

    Equals, where nothing over- or underflows, what SwAV, MSN, DINOv2 and DINOv3 do with Q = exp(logits): divide every
    column by its sum over the samples of all ranks, every row by its sum, `n_iterations` times. Beside the scores and
    the assignments there are only a few rows of logits at a time. The method is that of `prototype_offsets`.
    """

    def chunks() -> Iterable[Tensor]:
        return (at_least_float32(chunk) / temperature for chunk in scores.split(rows))

    rows = rows_per_chunk(scores.shape[1], scores.device, buffers=3)
    u = prototype_offsets(chunks, n_iterations, process_group)
    assignments = torch.empty_like(scores, dtype=u.dtype)
    for logits, result in zip(chunks(), assignments.split(rows), strict=True):
        torch.softmax(logits.sub_(u), dim=1, out=result)
    return assignments


@torch.no_grad()
def prototype_offsets(chunks: Chunks, n_iterations: int, process_group: dist.ProcessGroup | None) -> Tensor:
    """u (K,) with which the assignments of Sinkhorn-Knopp are softmax_k(logits_nk - u_k).

    Two vectors of offsets take the place of Q, so that no size of the logits overflows: with
    u_k = log sum_n exp(logits_nk - v_n) and v_n at first 0, then log sum_k exp(logits_nk - u_k). The numbers of samples
    and prototypes, and the sum of Q, cancel.

    The first u_k takes with it any constant that was added to a prototype's logits: log C_p of a teacher whose raw
    logits come here, as in DINOv2 and DINOv3, has no effect at all. (MSN's targets come after a softmax.)
    """
    at_least("n_iterations", n_iterations, 1)
    u = _logsumexp_over_ranks(_logsumexp_of_columns(chunks()), process_group)
    for _ in range(n_iterations - 1):
        balanced = (logits.sub_(torch.logsumexp(logits - u, dim=1, keepdim=True)) for logits in chunks())
        u = _logsumexp_over_ranks(_logsumexp_of_columns(balanced), process_group)
    return u


@torch.no_grad()
def prototype_offsets_of_features(
    output: HeadOutput,
    n_iterations: int,
    process_group: dist.ProcessGroup | None,
    *,
    temperature: float,
    exact: bool,
) -> Tensor:
    """`prototype_offsets` (K,) of the logits <w, y> / temperature of these features (N, p), few rows at a time.

    `exact` keeps the products in float32 under CUDA autocast.
    """
    prototypes = output.prototypes
    rows = rows_per_chunk(len(prototypes), prototypes.device, buffers=4)

    def logits() -> Iterable[Tensor]:
        for chunk in output.features.split(rows):
            yield linear_float32(chunk, prototypes, exact=exact).div_(temperature)

    return prototype_offsets(logits, n_iterations, process_group)


def _logsumexp_of_columns(chunks: Iterable[Tensor]) -> Tensor:
    """(K,) over the rows of all chunks (c, K), of which there must be one, be it empty."""
    return reduce(torch.logaddexp, (torch.logsumexp(chunk, dim=0) for chunk in chunks))


def _logsumexp_over_ranks(local: Tensor, process_group: dist.ProcessGroup | None) -> Tensor:
    if not (dist.is_available() and dist.is_initialized()):
        return local
    largest = local.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=process_group)
    return largest + all_reduce_sum_((local - largest).exp(), process_group).log()
