"""The losses that are compared: each maps `Inputs` to a loss to call backward on."""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.loss.inputs import STUDENT_TEMPERATURE, TEACHER_TEMPERATURE, Inputs
from vmf_heads import _chunked, prototype_cross_entropy
from vmf_heads.cross_entropy import dino_pairs

Contender = Callable[[Inputs], Tensor]

PLAIN, COMPILED, PRODUCTS = "plain DINO", "plain DINO, compiled", "the matrix products alone"
FUSED, UNFUSED = "vMF, fused", "vMF, unfused"


def plain(inputs: Inputs) -> Tensor:
    """What DINO's training script does after the bottleneck, operation by operation; iBOT's patches likewise."""
    student = inputs.y @ inputs.prototypes().T / STUDENT_TEMPERATURE
    with torch.no_grad():
        teacher = inputs.teacher_y @ inputs.teacher_prototypes().T
        targets = torch.softmax((teacher - inputs.center) / TEACHER_TEMPERATURE, dim=-1)
        center = inputs.center * 0.9 + teacher.mean(dim=0, keepdim=True) * 0.1
    del center  # computed for its cost; every call gets the same centre
    return _pairs(student, targets, inputs.size.ncrops)


def unfused(inputs: Inputs) -> Tensor:
    """DINO-vMF with every logit in memory, as DINOLoss(fused=False)."""
    bias, teacher_bias = inputs.log_normalizers()
    student = inputs.y @ inputs.prototypes().T / STUDENT_TEMPERATURE + bias
    with torch.no_grad():
        raw = inputs.teacher_y @ inputs.teacher_prototypes().T / TEACHER_TEMPERATURE
        targets = torch.softmax(raw + teacher_bias - inputs.center, dim=1)
        torch.log_softmax(raw, dim=1).logsumexp(dim=0)
    return _pairs(student, targets, inputs.size.ncrops)


def fused(inputs: Inputs) -> Tensor:
    """DINO-vMF by `prototype_cross_entropy`."""
    bias, teacher_bias = inputs.log_normalizers()
    size = inputs.size
    targets, weights = dino_pairs(size.images, size.ncrops, device=inputs.y.device) if size.ncrops else (None, None)
    loss, _, _ = prototype_cross_entropy(
        inputs.y,
        inputs.prototypes(),
        inputs.teacher_y,
        inputs.teacher_prototypes(),
        student_temperature=STUDENT_TEMPERATURE,
        teacher_temperature=TEACHER_TEMPERATURE,
        student_log_normalizer=bias,
        teacher_log_normalizer=teacher_bias,
        log_center=inputs.center[0],
        targets=targets,
        weights=weights,
    )
    return loss if size.ncrops else loss / size.images


@torch.no_grad()
def products(inputs: Inputs) -> None:
    """The products of `fused` in the same chunks and nothing else: the floor of its time."""
    w, teacher_w = inputs.prototypes(), inputs.teacher_prototypes()
    k, rows = len(w), _chunked._CHUNK_BYTES[inputs.y.device.type] // (4 * len(w))
    gradient, same_position = torch.zeros_like(w), not inputs.size.ncrops
    chunks = _chunked._chunks(len(inputs.y), rows // 3 if same_position else rows)
    buffer = torch.empty(chunks[0].stop, k, device=w.device)
    for chunk in chunks:
        y = inputs.y[chunk]
        if same_position:
            torch.mm(inputs.teacher_y[chunk], teacher_w.T, out=buffer[: len(y)])
        logits = torch.mm(y, w.T, out=buffer[: len(y)])
        logits @ w
        gradient.addmm_(logits.T, y)
    for chunk in [] if same_position else _chunked._chunks(len(inputs.teacher_y), rows // 2):
        y = inputs.teacher_y[chunk]
        logits = torch.mm(y, teacher_w.T, out=buffer[: len(y)])
        logits @ w
        gradient.addmm_(logits.T, y)


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
