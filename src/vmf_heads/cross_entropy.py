"""The self-distillation loss from features and prototypes, without ever holding the (N, K) logits."""

from __future__ import annotations

import torch
from torch import Tensor

from ._at_once import CrossEntropyAtOnce, is_at_once
from ._checks import at_least, constant, one_of
from ._chunked import ChunkedCrossEntropy
from ._distillation import Distillation
from ._matmul import autocast_dtype, without_autocast
from ._memory import rows_per_chunk
from ._shards import exchanges, local_rows, place_of, shards_of
from ._unit_rows import unit_rows
from .centering import CENTER_ON, teacher_targets
from .head import NORMALIZERS
from .prototypes import HeadOutput, norms_of, prototype_log_normalizer
from .special import vmf_mean_resultant

__all__ = ["dino_pairs", "prototype_cross_entropy", "prototype_cross_entropy_reference"]


def prototype_cross_entropy(
    student: HeadOutput,
    teacher: HeadOutput,
    *,
    student_temperature: float,
    teacher_temperature: float,
    normalizer: str = "vmf",
    log_center: Tensor | None = None,
    teacher_rows: Tensor | None = None,
    weights: Tensor | None = None,
    center_on: str = "responsibilities",
    batch_chunk_size: int | None = None,
) -> tuple[Tensor, Tensor, int]:
    """DINO's loss without its logits: exact value and gradients in O(chunk * K + K * p + N * p) memory.

    Equals `prototype_cross_entropy_reference`, which holds everything, to rounding. With y, w and z, u the features and
    prototypes of student and teacher, and log C_p of each prototype at the temperature of its side::

        s = y @ w.T / student_temperature + log C_p(||w|| / student_temperature)                    # Eq. 6
        raw = z @ u.T / teacher_temperature
        t = softmax(raw + log C_p(||u|| / teacher_temperature) - log_center)                        # Eq. 7
        loss = sum(
            weights[i, m] * -(t[teacher_rows[i, m]] * log_softmax(s[i])).sum()
            for i, m if teacher_rows[i, m] >= 0
        )
        log_sum = log(softmax(raw + log C_p(||u|| / teacher_temperature)).sum(dim=0))               # for Eq. 9

    With scales, prototypes are weight-normalised, w_k = g_k v_k / ||v_k||, and the only (K, p) tensors are v and its
    gradient: w and the gradient of w are never made.

    Where directions and scales are DTensors, each rank's the rows of its own prototypes (`vmf_heads.parallel`), every
    rank calls with its own student and teacher rows and gets the loss and the gradients of its own features. The
    gradients of the prototypes are DTensors, too, those of the mean of the losses over all ranks of the mesh, as
    DistributedDataParallel makes them for other parameters. Rows of features are sent, and a few numbers for each,
    but nothing with K columns.

    Inside torch.compile on a CPU few rows, whose logits take up to half of a chunk, are done at once in code of their
    own; more are one operator, which does the same as without a compiler. On a GPU the chunks are traced.

    In the words of `torch.nn.functional.linear_cross_entropy` (torch >= 2.13), `student.features` is `input`, the
    student's prototypes over the temperature are `linear_weight`, log C_p is `linear_bias`, and t, which is never held
    either, is a `target` of probabilities; `batch_chunk_size` is the option of that name, and `reduction` is "sum".

    Args:
        student: y (Ns, p) unit rows and prototypes (K, p); features, directions and scales carry gradients. A few
            rows are looked at: whether they are unit vectors, or 0.
        teacher: z (Nt, p) and prototypes (K, p); no gradient flows to them.
        student_temperature: > 0; like the other and the weights a constant, to which no gradient flows.
        teacher_temperature: > 0.
        normalizer: "vmf" adds log C_p on both sides; "none" is plain DINO.
        log_center: c (K,) of Eq. 9. None: zeros.
        teacher_rows: (Ns, M) int64, the teacher rows that student row i is trained towards; -1 means none. None:
            student row i is trained towards teacher row i (iBOT's patches), which takes four products on every device.
            Others take four where few rows hang together, as the crops of an image, on a CPU and with p >= 128;
            elsewhere six.
        weights: (Ns, M) float, what each pair counts; None counts 1. All averaging lives here.
        center_on: what log_sum averages: "responsibilities" (the teacher's log C_p inside the softmax) or "scores"
            (without it, as Eq. 9 is printed); see `ProbabilityCentering`.
        batch_chunk_size: rows of logits that exist at a time, all buffers together; None chooses from a memory budget.

    Returns:
        (loss, log_sum, rows): the loss in float32 (float64 for float64 tensors), and the teacher's statistics for
            `ProbabilityCentering.accumulate_log_sum_`: log sum_b softmax_k (K,) over its `rows` rows. Under CUDA
            autocast the operands of the products are rounded to the autocast dtype and accumulated in float32; logits,
            softmax and loss are float32. Of prototypes that are cut over ranks, log_sum is over the rows of all of
            these, and -inf for the prototypes of other ranks: what is right is the sum of the probabilities and of
            `rows` over the ranks, which the centre forms.

    Raises:
        ValueError, TypeError: an argument is out of range, a shape does not fit, features are no unit vectors, or
            weights or a temperature require grad; the message names it.
        IndexError: `teacher_rows` names a row that `teacher.features` does not have. On a GPU and inside
            torch.compile it may be torch's own error.
        RuntimeError: a gradient was taken with create_graph=True. There is no second derivative. Or ranks that share
            prototypes out multiplied their losses by different numbers before the backward pass.

    Reference: Govindarajan et al., ICLR 2023, Eq. 6, 7 and 9. The algebra: docs/loss.md.

    >>> import torch
    >>> from torch.nn.functional import normalize
    >>> from vmf_heads import HeadOutput, prototype_cross_entropy
    >>> from vmf_heads.cross_entropy import dino_pairs
    >>> y, w = normalize(torch.randn(4 * 8, 16), dim=1).requires_grad_(), torch.randn(100, 16)
    >>> student, teacher = HeadOutput(y, w, None), HeadOutput(y[: 2 * 8], w, None)
    >>> teacher_rows, weights = dino_pairs(batch_size=8, ncrops=4)
    >>> loss, log_sum, rows = prototype_cross_entropy(
    ...     student,
    ...     teacher,
    ...     student_temperature=0.1,
    ...     teacher_temperature=0.04,
    ...     teacher_rows=teacher_rows,
    ...     weights=weights,
    ... )
    >>> loss.backward()
    >>> y.grad.shape, log_sum.shape, rows
    (torch.Size([32, 16]), torch.Size([100]), 16)
    """
    one_of("normalizer", normalizer, NORMALIZERS)
    one_of("center_on", center_on, CENTER_ON)
    constant("student_temperature", student_temperature)
    constant("teacher_temperature", teacher_temperature)
    _check_shapes(student, teacher, log_center, teacher_rows, weights)
    if weights is not None and weights.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "`weights` must not require grad: no gradient flows to them here. Pass `weights.detach()`, or use "
            "`prototype_cross_entropy_reference`"
        )
    unit_rows("student.features", student.features)
    unit_rows("teacher.features", teacher.features)
    if teacher_rows is not None and len(teacher.features) == 0:
        if (teacher_rows >= 0).any():
            raise ValueError("`teacher_rows` must be -1 everywhere, because `teacher.features` has no rows")
        teacher_rows, weights = teacher_rows[:, :0], None if weights is None else weights[:, :0]
    dtype = _common_dtype(student, teacher)
    total = len(student.directions)
    shards = shards_of(student.directions, "student.directions")
    if batch_chunk_size is None:
        # On every rank the same number, so that all have as many chunks.
        batch_chunk_size = rows_per_chunk(total if shards is None else shards.most, student.features.device)
    else:
        at_least("batch_chunk_size", batch_chunk_size, 1)

    student = HeadOutput(*(None if x is None else local_rows(x).to(dtype) for x in student))  # type: ignore[arg-type]
    teacher = HeadOutput(*(None if x is None else local_rows(x.detach()).to(dtype) for x in teacher))  # type: ignore[arg-type]
    if shards is not None and log_center is not None:
        log_center = log_center[shards.columns]
    # Read here: inside an autograd.Function grad mode is always off.
    wanted = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in student)
    bias = bias_slope = log_normalizer = None
    if normalizer == "vmf":
        wants_norms = wanted[1 if student.scales is None else 2]
        temperatures = student_temperature, teacher_temperature
        bias, bias_slope, log_normalizer = _log_normalizers(student, teacher, *temperatures, wants_slope=wants_norms)
    averages_log_c = center_on == "responsibilities"
    students, teachers = exchanges(shards, student.features, teacher.features)
    distillation = Distillation(
        bias=bias,
        bias_slope=bias_slope,
        teacher=teacher,
        teacher_temperature=teacher_temperature,
        student_temperature=student_temperature,
        statistics_bias=log_normalizer if averages_log_c else None,
        target_bias=_difference(None if averages_log_c else log_normalizer, log_center, dtype),
        teacher_rows=teacher_rows,
        weights=weights,
        chunk_rows=batch_chunk_size,
        product_dtype=autocast_dtype(student.features.device),
        students=students,
        teachers=teachers,
    )
    with without_autocast(student.features.device):
        at_once = is_at_once(distillation, len(student.features), student.features.device)
        function = CrossEntropyAtOnce if at_once else ChunkedCrossEntropy
        loss, log_sum = function.apply(*student, distillation, wanted)
    if shards is not None:
        log_sum = shards.spread(log_sum, -torch.inf)
    return loss, log_sum, len(teacher.features)


def prototype_cross_entropy_reference(
    student: HeadOutput,
    teacher: HeadOutput,
    *,
    student_temperature: float,
    teacher_temperature: float,
    normalizer: str = "vmf",
    log_center: Tensor | None = None,
    teacher_rows: Tensor | None = None,
    weights: Tensor | None = None,
    center_on: str = "responsibilities",
) -> tuple[Tensor, Tensor, int]:
    """The definition of `prototype_cross_entropy`, with every logit in memory: for reading and for testing.

    Arguments and results are those of `prototype_cross_entropy`. Here temperatures and weights carry gradients, too,
    and gradients can be differentiated again.
    """
    y, w, z, u = student.features, student.prototypes, teacher.features, teacher.prototypes
    dim = w.shape[1]
    if teacher_rows is None:
        teacher_rows = torch.arange(len(y), device=y.device)[:, None]
    if weights is None:
        weights = torch.ones(teacher_rows.shape, dtype=y.dtype, device=y.device)
    logits = y @ w.T / student_temperature
    with torch.no_grad():
        scores = z @ u.T
        log_normalizer = scores.new_zeros(len(u))
        if normalizer == "vmf":
            log_normalizer = prototype_log_normalizer(teacher.norms, dim, teacher_temperature)
        targets = teacher_targets(scores, teacher_temperature, log_normalizer=log_normalizer, log_center=log_center)
        averaged = scores / teacher_temperature
        if center_on == "responsibilities":
            averaged = averaged + log_normalizer
        log_sum = torch.log_softmax(averaged, dim=1).logsumexp(dim=0)
    if normalizer == "vmf":
        logits = logits + prototype_log_normalizer(student.norms, dim, student_temperature)
    log_probabilities = torch.log_softmax(logits, dim=1)
    loss = logits.new_zeros(())
    for m in range(teacher_rows.shape[1]):
        rows = teacher_rows[:, m] >= 0
        cross_entropy = -(targets[teacher_rows[rows, m]] * log_probabilities[rows]).sum(dim=1)
        loss = loss + (weights[rows, m] * cross_entropy).sum()
    return loss, log_sum, len(z)


def dino_pairs(
    batch_size: int, ncrops: int, *, ngcrops: int = 2, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """(teacher_rows, weights) of DINO: every crop towards all global crops, but not towards the view that it is.

    The rows are crop by crop: student row v * batch_size + b is crop v of image b, and so for the teacher's `ngcrops`.

    Args:
        batch_size: images B, >= 1.
        ncrops: crops per image, the global ones first; >= 2 and >= `ngcrops`.
        ngcrops: global crops, which the teacher sees; >= 1.
        device: of the results.

    Returns:
        Two tensors (ncrops * B, ngcrops), int64 and float64. The weights make the sum DINO's mean over pairs, images.

    Raises:
        ValueError, TypeError: an argument is out of its range.

    >>> from vmf_heads.cross_entropy import dino_pairs
    >>> teacher_rows, weights = dino_pairs(batch_size=2, ncrops=3)
    >>> teacher_rows.tolist()
    [[-1, 2], [-1, 3], [0, -1], [1, -1], [0, 2], [1, 3]]
    """
    at_least("batch_size", batch_size, 1)
    at_least("ngcrops", ngcrops, 1)
    at_least("ncrops", ncrops, max(2, ngcrops))
    row = torch.arange(ncrops * batch_size, device=device)[:, None]
    of_image = row % batch_size + batch_size * torch.arange(ngcrops, device=device)
    teacher_rows = torch.where(of_image == row, -1, of_image)
    weight = 1 / (batch_size * ngcrops * (ncrops - 1))
    return teacher_rows, torch.full(teacher_rows.shape, weight, dtype=torch.float64, device=device)


def _log_normalizers(
    student: HeadOutput,
    teacher: HeadOutput,
    student_temperature: float,
    teacher_temperature: float,
    *,
    wants_slope: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """log C_p of the student's prototypes, the slope that `Distillation` describes, and the teacher's log C_p: (K,).

    With A = -dlog C_p/dkappa, and since d||w||/dw = w / ||w||, the slope is -A(||w|| / tau) / (tau ||w||). The loss
    finishes the gradients that it leads to with all others, where autograd would make two more tensors (K, p).
    """
    dim = student.directions.shape[1]
    # Both together, because that is one kernel instead of two.
    norms = torch.stack([norms_of(student), norms_of(teacher)]).detach()
    temperatures = norms.new_tensor([[student_temperature], [teacher_temperature]])
    bias, log_normalizer = prototype_log_normalizer(norms, dim, temperatures)
    if not wants_slope:
        return bias, None, log_normalizer
    with without_autocast(norms.device):
        mean_resultant = vmf_mean_resultant(norms[0] / student_temperature, dim)
        slope = mean_resultant / (-student_temperature * norms[0].clamp(min=torch.finfo(norms.dtype).tiny))
    return bias, slope, log_normalizer


def _difference(log_normalizer: Tensor | None, log_center: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """log C_p - c (K,), where None stands for zeros."""
    if log_center is None:
        return log_normalizer
    log_center = log_center.detach().to(dtype)
    return -log_center if log_normalizer is None else log_normalizer - log_center


def _check_shapes(
    student: HeadOutput,
    teacher: HeadOutput,
    log_center: Tensor | None,
    teacher_rows: Tensor | None,
    weights: Tensor | None,
) -> None:
    shape = student.directions.shape
    if len(shape) != 2:
        raise ValueError(f"`student.directions` (of shape {tuple(shape)}) must be (K, p)")
    if teacher.directions.shape != shape:
        raise ValueError(
            f"`teacher.directions` (of shape {tuple(teacher.directions.shape)}) must have the shape of "
            f"`student.directions` (={tuple(shape)})"
        )
    total, p = shape
    place = place_of(student.directions)
    for name, x in (*_named("student", student), *_named("teacher", teacher)):
        if place_of(x) != place:
            raise ValueError(
                f"`{name}` (placed: {place_of(x)}) must be cut over ranks as `student.directions` is (placed: {place})"
            )
    for name, features in (("student.features", student.features), ("teacher.features", teacher.features)):
        if features.dim() != 2 or features.shape[1] != p:
            raise ValueError(
                f"`{name}` (of shape {tuple(features.shape)}) must be (N, p) with p (={p}) of the prototypes"
            )
    per_prototype = {"student.scales": student.scales, "teacher.scales": teacher.scales, "log_center": log_center}
    for name, tensor in per_prototype.items():
        if tensor is not None and tensor.shape != (total,):
            raise ValueError(
                f"`{name}` (of shape {tuple(tensor.shape)}) must be (K,) with K (={total}) the number of prototypes"
            )
    rows = len(student.features)
    if teacher_rows is None and rows != len(teacher.features):
        raise ValueError(
            f"`teacher_rows` (=None) needs as many rows in `student.features` (={rows}) as in "
            f"`teacher.features` (={len(teacher.features)})"
        )
    if teacher_rows is not None and (
        teacher_rows.dim() != 2 or len(teacher_rows) != rows or teacher_rows.dtype != torch.int64
    ):
        raise ValueError(
            f"`teacher_rows` (of shape {tuple(teacher_rows.shape)}, {teacher_rows.dtype}) must be (Ns, M) int64 with "
            f"Ns (={rows}) rows"
        )
    expected = (rows, 1) if teacher_rows is None else tuple(teacher_rows.shape)
    if weights is not None and tuple(weights.shape) != expected:
        raise ValueError(
            f"`weights` (of shape {tuple(weights.shape)}) must have the shape of `teacher_rows` (={expected})"
        )


def _named(side: str, output: HeadOutput) -> list[tuple[str, Tensor]]:
    """The prototypes' tensors, with the names that errors call them by."""
    tensors = {"directions": output.directions, "scales": output.scales}
    return [(f"{side}.{name}", tensor) for name, tensor in tensors.items() if tensor is not None]


def _common_dtype(student: HeadOutput, teacher: HeadOutput) -> torch.dtype:
    """float64 if all tensors are, float32 if none is."""
    dtypes = {x.dtype for x in (*student, *teacher) if x is not None}
    if torch.float64 not in dtypes:
        return torch.float32
    if len(dtypes) > 1:
        names = ", ".join(sorted(map(str, dtypes)))
        raise TypeError(f"features, directions and scales (of {names}) must all be float64 or none")
    return torch.float64
