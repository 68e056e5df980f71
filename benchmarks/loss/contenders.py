"""The losses that are compared: each maps `Inputs` to a loss to call backward on."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.loss.inputs import STUDENT_TEMPERATURE, TEACHER_TEMPERATURE, Inputs
from vmf_heads import prototype_cross_entropy
from vmf_heads._logits import LogitsMemory, chunks_of
from vmf_heads._matmul import autocast_dtype, mm_float32, without_autocast
from vmf_heads._memory import rows_per_chunk
from vmf_heads._row_groups import row_groups
from vmf_heads._rows_together import pairs_per_chunk
from vmf_heads.cross_entropy import dino_pairs

Contender = Callable[[Inputs], Tensor]

PLAIN, COMPILED, PRODUCTS = "plain DINO", "plain DINO, compiled", "the matrix products alone"
FUSED, FUSED_COMPILED, UNFUSED = "vMF, fused", "vMF, fused, compiled", "vMF, unfused"
FLEX, SDPA = "vMF, flex_attention", "vMF, SDPA"
CHUNKED, CHUNKED_COMPILED = "vMF, chunks, eager epilogues", "vMF, chunks, compiled epilogues"
LINEAR = "plain DINO, linear_cross_entropy"


def plain(inputs: Inputs) -> Tensor:
    """What DINO's training script does after the bottleneck, operation by operation; iBOT's patches likewise."""
    student = inputs.y @ inputs.prototypes().T / STUDENT_TEMPERATURE
    with torch.no_grad():
        teacher = inputs.teacher_y @ inputs.teacher_prototypes().T
        targets = torch.softmax((teacher - inputs.center) / TEACHER_TEMPERATURE, dim=-1)
        inputs.statistics = inputs.center * 0.9 + teacher.mean(dim=0, keepdim=True) * 0.1
    return _pairs(student, targets, inputs.size.ncrops)


def unfused(inputs: Inputs) -> Tensor:
    """DINO-vMF with every logit in memory, as DINOLoss(fused=False)."""
    bias, teacher_bias = inputs.log_normalizers()
    student = inputs.y @ inputs.prototypes().T / STUDENT_TEMPERATURE + bias
    with torch.no_grad():
        raw = inputs.teacher_y @ inputs.teacher_prototypes().T / TEACHER_TEMPERATURE
        logits = raw + teacher_bias
        targets = torch.softmax(logits - inputs.center, dim=1)
        inputs.statistics = torch.log_softmax(logits, dim=1).logsumexp(dim=0)
    return _pairs(student, targets, inputs.size.ncrops)


def linear(inputs: Inputs) -> Tensor:
    """Plain DINO by torch's `linear_cross_entropy`, in chunks; it takes the sum of the targets of each row, (rows, K).

    RuntimeError where this torch does not have it, or would hold every logit because the targets are probabilities.
    """
    if not hasattr(torch.nn.functional, "linear_cross_entropy"):
        raise RuntimeError("this torch does not have it")
    size, w = inputs.size, inputs.prototypes()
    with torch.no_grad():
        teacher = inputs.teacher_y @ inputs.teacher_prototypes().T
        targets = torch.softmax((teacher - inputs.center) / TEACHER_TEMPERATURE, dim=-1)
        inputs.statistics = inputs.center * 0.9 + teacher.mean(dim=0, keepdim=True) * 0.1
        if size.ncrops:
            first, second = targets.chunk(2)
            targets = torch.cat([second, first, *[first + second] * (size.ncrops - 2)])
    del teacher
    dtype = autocast_dtype(w.device) or w.dtype
    operands = [x.to(dtype) for x in (inputs.y / STUDENT_TEMPERATURE, w, targets)]
    options = torch.nn.LinearCrossEntropyOptions()
    with without_autocast(w.device), warnings.catch_warnings():
        warnings.simplefilter("error")  # that the options are ignored
        try:
            total = torch.nn.functional.linear_cross_entropy(*operands, reduction="sum", options=options)
        except UserWarning:
            raise RuntimeError("this torch does it in chunks for class indices only") from None
    return total / (size.images * (2 * size.ncrops - 2 if size.ncrops else 1))


def fused(inputs: Inputs, *, normalizer: str = "vmf", chunk_rows: int | None = None) -> Tensor:
    """DINO-vMF by `prototype_cross_entropy`, from directions and scales where the start is a head's parameters."""
    size = inputs.size
    teacher_rows, weights = (
        dino_pairs(size.images, size.ncrops, device=inputs.y.device) if size.ncrops else (None, None)
    )
    loss, inputs.statistics, _ = prototype_cross_entropy(
        inputs.student,
        inputs.teacher,
        student_temperature=STUDENT_TEMPERATURE,
        teacher_temperature=TEACHER_TEMPERATURE,
        normalizer=normalizer,
        log_center=inputs.center[0],
        teacher_rows=teacher_rows,
        weights=weights,
        batch_chunk_size=chunk_rows,
    )
    return loss if size.ncrops else loss / size.images


@torch.no_grad()
def products(inputs: Inputs) -> None:
    """The products of `fused` in the same chunks and dtype and nothing else: the floor of its time."""
    half = autocast_dtype(inputs.y.device)
    w, teacher_w, y, teacher_y = (
        x if half is None else x.to(half)
        for x in (inputs.student.directions, inputs.teacher.directions, inputs.y, inputs.teacher_y)
    )
    k, rows = len(w), rows_per_chunk(len(w), w.device)
    gradient, same_position = torch.zeros(w.shape, device=w.device), not inputs.size.ncrops
    chunks = chunks_of(len(y), pairs_per_chunk(rows, w.device) if same_position else rows)
    memory = LogitsMemory(max(chunks[0].stop, min(rows, len(teacher_y))), w)
    probabilities = torch.ones(chunks[0].stop, k, dtype=half, device=w.device) if half else None

    def logits(rows: Tensor, prototypes: Tensor) -> None:
        if half is None:
            torch.mm(rows, prototypes.T, out=memory.take(len(rows))[0])
        else:
            mm_float32(rows, prototypes.T)

    def gradients(rows: Tensor) -> None:
        p = memory.take(len(rows))[0] if probabilities is None else probabilities[: len(rows)]
        if half is None:
            p @ w
            gradient.addmm_(p.T, rows)
        else:
            mm_float32(p, w)
            mm_float32(p.T, rows)

    together = None
    if inputs.size.ncrops and w.device.type == "cpu":  # where the targets are subtracted from the student's softmax
        pairs, _ = dino_pairs(inputs.size.images, inputs.size.ncrops)
        together = row_groups(pairs, len(teacher_y), most_rows=rows, dim=w.shape[1])
    for teachers in together or ():
        logits(teacher_y[teachers.rows], teacher_w)
        for students in teachers.students:
            logits(y[students.rows], w)
            gradients(y[students.rows])
    for chunk in () if together else chunks:
        if same_position:
            logits(teacher_y[chunk], teacher_w)
        logits(y[chunk], w)
        gradients(y[chunk])
    # Where the teacher's rows have chunks of their own, so have the logits of its statistics, but on a CPU.
    rows = rows if w.device.type == "cpu" else rows // 2
    for chunk in () if together or same_position else chunks_of(len(teacher_y), rows):
        logits(teacher_y[chunk], teacher_w)
        gradients(teacher_y[chunk])


def _pairs(student: Tensor, targets: Tensor, ncrops: int) -> Tensor:
    """DINO's double loop over crops; its softmax is inside, as there."""
    if not ncrops:
        return -(targets * torch.log_softmax(student, dim=-1)).sum(dim=-1).mean()
    total, terms = torch.zeros((), device=student.device), 0
    crops = student.chunk(ncrops)
    for u, target in enumerate(targets.chunk(2)):
        for v, crop in enumerate(crops):
            if v != u:
                total = total + torch.sum(-target * torch.log_softmax(crop, dim=-1), dim=-1).mean()
                terms += 1
    return total / terms
