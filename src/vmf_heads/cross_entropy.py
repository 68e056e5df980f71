"""The self-distillation loss from features and prototypes, without ever holding the [N, K] logits."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _epilogues
from ._checks import at_least, one_of, positive
from ._chunked import ChunkedCrossEntropy, Distillation
from ._matmul import at_least_float32, autocast_dtype, without_autocast
from .centering import CENTER_ON

__all__ = ["dino_pairs", "prototype_cross_entropy", "prototype_cross_entropy_reference"]

REDUCTIONS = ("sum", "none")


def prototype_cross_entropy(
    student_features: Tensor,
    student_prototypes: Tensor,
    teacher_features: Tensor,
    teacher_prototypes: Tensor,
    *,
    student_temperature: float,
    teacher_temperature: float,
    student_scale: Tensor | None = None,
    teacher_scale: Tensor | None = None,
    student_log_normalizer: Tensor | None = None,
    teacher_log_normalizer: Tensor | None = None,
    log_center: Tensor | None = None,
    targets: Tensor | None = None,
    weights: Tensor | None = None,
    center_on: str = "scores",
    reduction: str = "sum",
    chunk_rows: int | None = None,
    compiled: bool = False,
) -> tuple[Tensor, Tensor, int]:
    """DINO's loss without its logits: exact value and gradients in O(chunk * K + K * p + N * p) memory.

    Equals `prototype_cross_entropy_reference`, which holds everything, to rounding::

        s = student_features @ student_prototypes.T / student_temperature + student_log_normalizer
        raw = teacher_features @ teacher_prototypes.T / teacher_temperature
        t = softmax(raw + teacher_log_normalizer - log_center)
        loss = sum(weights[i, m] * -(t[targets[i, m]] * log_softmax(s[i])).sum() for i, m if targets[i, m] >= 0)
        log_sum = log(softmax(raw).sum(dim=0))

    With scales, the prototypes are weight-normalised, w_k = scale_k v_k / ||v_k|| for v = student_prototypes, and the
    only (K, p) tensors are v and its gradient: w and the gradient of w are never made. For a head's last layer, v is
    `weight_v` and the scale `weight_g.squeeze(1)`, or the fields of `HeadOutput`.

    Args:
        student_features: y (Ns, p), unit rows; carries gradients.
        student_prototypes: w (K, p), or their directions v if there is a `student_scale`; carries gradients.
        teacher_features, teacher_prototypes: (Nt, p) and (K, p); no gradient flows to them.
        student_temperature, teacher_temperature: > 0.
        student_scale: (K,) of either sign; carries gradients. None: `student_prototypes` are w.
        teacher_scale: the same for `teacher_prototypes`; no gradient flows to it. One may be given without the other.
        student_log_normalizer: log C_p of the student's prototypes (K,) up to a constant; carries gradients.
            None: zeros.
        teacher_log_normalizer: the same for the teacher's. None: zeros.
        log_center: c (K,) of Eq. 9. None: zeros.
        targets: (Ns, M) int64, the teacher rows that student row i is trained towards; -1 means none. None: student row
            i is trained towards teacher row i (iBOT's patches), which needs two products fewer.
        weights: (Ns, M) float, what each pair counts; None counts 1. All averaging lives here.
        center_on: what log_sum averages: "scores" (softmax of raw, as Eq. 9 is printed) or "responsibilities" (with
            `teacher_log_normalizer` inside).
        reduction: "sum", or "none" for the (Ns,) losses of the student rows (their backward computes everything again).
        chunk_rows: rows of logits that exist at a time, all buffers together; None chooses from a memory budget.
        compiled: fuse the elementwise work between the products with torch.compile (Triton on CUDA, a C++ compiler on
            CPU), which takes seconds at the first call and fails where torch.compile does.

    Returns:
        (loss, log_sum, rows): the loss in float32, and the teacher's statistics for `ProbabilityCentering.accumulate_`:
        log sum_b softmax_k (K,) over its `rows` rows. Under CUDA autocast the operands of the products are rounded to
        the autocast dtype and accumulated in float32; logits, softmax and loss are float32.

    Raises:
        ValueError, TypeError: an argument is out of range or a shape does not fit; the message names it.

    Source: Govindarajan et al., ICLR 2023, Eq. 6, 7 and 9. The algebra: docs/loss.md.

    >>> import torch
    >>> from torch.nn.functional import normalize
    >>> from vmf_heads import prototype_cross_entropy
    >>> from vmf_heads.cross_entropy import dino_pairs
    >>> y, w = normalize(torch.randn(4 * 8, 16), dim=1).requires_grad_(), torch.randn(100, 16)
    >>> targets, weights = dino_pairs(batch_size=8, ncrops=4)
    >>> loss, log_sum, rows = prototype_cross_entropy(
    ...     y, w, y[: 2 * 8], w, student_temperature=0.1, teacher_temperature=0.04, targets=targets, weights=weights
    ... )
    >>> loss.backward()
    >>> y.grad.shape, log_sum.shape, rows
    (torch.Size([32, 16]), torch.Size([100]), 16)
    """
    one_of("reduction", reduction, REDUCTIONS)
    one_of("center_on", center_on, CENTER_ON)
    positive("student_temperature", student_temperature)
    positive("teacher_temperature", teacher_temperature)
    _check_shapes(student_features, student_prototypes, teacher_features, teacher_prototypes, targets, weights)
    for name, per_prototype in (
        ("student_scale", student_scale),
        ("teacher_scale", teacher_scale),
        ("student_log_normalizer", student_log_normalizer),
        ("teacher_log_normalizer", teacher_log_normalizer),
        ("log_center", log_center),
    ):
        if per_prototype is not None and per_prototype.shape != student_prototypes.shape[:1]:
            raise ValueError(
                f"`{name}` (of shape {tuple(per_prototype.shape)}) must be (K,) with K (={len(student_prototypes)}) "
                "the number of prototypes"
            )
    tensors = (student_features, student_prototypes, student_scale, teacher_features, teacher_prototypes, teacher_scale)
    dtypes = {str(at_least_float32(x).dtype) for x in tensors if x is not None}
    if len(dtypes) > 1:
        raise TypeError(f"features, prototypes and scales (of {', '.join(sorted(dtypes))}) must all be float64 or none")

    averages_log_c = center_on == "responsibilities"
    distillation = Distillation(
        teacher_features=at_least_float32(teacher_features.detach()),
        teacher_prototypes=at_least_float32(teacher_prototypes.detach()),
        teacher_scale=None if teacher_scale is None else at_least_float32(teacher_scale.detach()),
        statistics_bias=_bias(teacher_log_normalizer, None) if averages_log_c else None,
        target_bias=_bias(None if averages_log_c else teacher_log_normalizer, log_center),
        student_temperature=student_temperature,
        teacher_temperature=teacher_temperature,
        targets=targets,
        weights=weights,
        per_row=reduction == "none",
        chunk_rows=None if chunk_rows is None else at_least("chunk_rows", chunk_rows, 1),
        product_dtype=autocast_dtype(student_features.device),
        epilogues=_epilogues.compiled() if compiled else _epilogues.PLAIN,
    )
    inputs = (student_features, student_prototypes, student_scale, student_log_normalizer)
    # Read here: inside an autograd.Function grad mode is always off.
    wanted = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs)
    with without_autocast(student_features.device):
        dtype = at_least_float32(student_features).dtype  # of log C_p, too, which may come in another
        loss, log_sum = ChunkedCrossEntropy.apply(
            *(x if x is None else x.to(dtype) for x in inputs), distillation, wanted
        )
    return loss, log_sum, len(teacher_features)


def prototype_cross_entropy_reference(
    student_features: Tensor,
    student_prototypes: Tensor,
    teacher_features: Tensor,
    teacher_prototypes: Tensor,
    *,
    student_temperature: float,
    teacher_temperature: float,
    student_scale: Tensor | None = None,
    teacher_scale: Tensor | None = None,
    student_log_normalizer: Tensor | float = 0.0,
    teacher_log_normalizer: Tensor | float = 0.0,
    log_center: Tensor | float = 0.0,
    targets: Tensor,
    weights: Tensor,
    center_on: str = "scores",
) -> tuple[Tensor, Tensor, int]:
    """The definition of `prototype_cross_entropy`, with every logit in memory: for reading and for testing."""
    student_prototypes = weight_normed(student_prototypes, student_scale)
    teacher_prototypes = weight_normed(teacher_prototypes, teacher_scale)
    logits = student_features @ student_prototypes.T / student_temperature + student_log_normalizer
    log_probabilities = torch.log_softmax(logits, dim=1)
    with torch.no_grad():
        raw = teacher_features @ teacher_prototypes.T / teacher_temperature
        teacher = torch.softmax(raw + teacher_log_normalizer - log_center, dim=1)
        averaged = raw + teacher_log_normalizer if center_on == "responsibilities" else raw
        log_sum = torch.log_softmax(averaged, dim=1).logsumexp(dim=0)
    loss = logits.new_zeros(())
    for m in range(targets.shape[1]):
        rows = targets[:, m] >= 0
        cross_entropy = -(teacher[targets[rows, m]] * log_probabilities[rows]).sum(dim=1)
        loss = loss + (weights[rows, m] * cross_entropy).sum()
    return loss, log_sum, len(teacher_features)


def weight_normed(v: Tensor, scale: Tensor | None) -> Tensor:
    """The prototypes scale_k v_k / ||v_k|| (K, p), or v itself where there is no scale."""
    return v if scale is None else scale[:, None] * v / v.norm(dim=1, keepdim=True)


def dino_pairs(
    batch_size: int, ncrops: int, *, ngcrops: int = 2, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """(targets, weights) of DINO: every crop towards all global crops, but not towards the view that it is.

    The rows are crop by crop: student row v * batch_size + b is crop v of image b, and so for the teacher's `ngcrops`.
    Both results are (ncrops * batch_size, ngcrops); the weights make the sum DINO's mean over pairs and images.

    >>> targets, weights = dino_pairs(batch_size=2, ncrops=3)
    >>> targets.tolist()
    [[-1, 2], [-1, 3], [0, -1], [1, -1], [0, 2], [1, 3]]
    """
    at_least("batch_size", batch_size, 1)
    at_least("ngcrops", ngcrops, 1)
    at_least("ncrops", ncrops, max(2, ngcrops))
    image = torch.arange(batch_size, device=device).repeat(ncrops)
    view = torch.arange(ncrops, device=device).repeat_interleave(batch_size)
    teacher_view = torch.arange(ngcrops, device=device)
    same = view[:, None] == teacher_view
    targets = torch.where(same, -1, teacher_view * batch_size + image[:, None])
    weight = 1 / (batch_size * ngcrops * (ncrops - 1))
    return targets, torch.full(targets.shape, weight, dtype=torch.float64, device=device)


def _bias(log_normalizer: Tensor | None, log_center: Tensor | None) -> Tensor | None:
    if log_normalizer is None:
        return None if log_center is None else -at_least_float32(log_center.detach())
    bias = at_least_float32(log_normalizer.detach())
    return bias if log_center is None else bias - log_center.detach()


def _check_shapes(
    student_features: Tensor,
    student_prototypes: Tensor,
    teacher_features: Tensor,
    teacher_prototypes: Tensor,
    targets: Tensor | None,
    weights: Tensor | None,
) -> None:
    if student_prototypes.dim() != 2:
        raise ValueError(f"`student_prototypes` (of shape {tuple(student_prototypes.shape)}) must be (K, p)")
    if teacher_prototypes.shape != student_prototypes.shape:
        raise ValueError(
            f"`teacher_prototypes` (of shape {tuple(teacher_prototypes.shape)}) must have the shape of "
            f"`student_prototypes` (={tuple(student_prototypes.shape)})"
        )
    p = student_prototypes.shape[1]
    for name, features in (("student_features", student_features), ("teacher_features", teacher_features)):
        if features.dim() != 2 or features.shape[1] != p:
            raise ValueError(
                f"`{name}` (of shape {tuple(features.shape)}) must be (N, p) with p (={p}) of the prototypes"
            )
    if targets is None:
        if len(student_features) != len(teacher_features):
            raise ValueError(
                f"`targets` (=None) needs as many rows in `student_features` (={len(student_features)}) as in "
                f"`teacher_features` (={len(teacher_features)})"
            )
    elif targets.dim() != 2 or len(targets) != len(student_features) or targets.dtype != torch.int64:
        raise ValueError(
            f"`targets` (of shape {tuple(targets.shape)}, {targets.dtype}) must be (Ns, M) int64 with Ns "
            f"(={len(student_features)}) rows"
        )
    expected = (len(student_features), 1) if targets is None else tuple(targets.shape)
    if weights is not None and tuple(weights.shape) != expected:
        raise ValueError(f"`weights` (of shape {tuple(weights.shape)}) must have the shape of `targets` (={expected})")
