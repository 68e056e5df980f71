"""The fused loss written out for a GPU, for comparison: products by cuBLAS, with eager or compiled epilogues.

An epilogue is all that happens to the logits of a chunk between two products. Here each side has a single one, which
torch.compile can turn into few kernels that read the logits, and write probabilities in half precision, once or twice.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from benchmarks.loss.attention import pairs
from benchmarks.loss.inputs import STUDENT_TEMPERATURE, TEACHER_TEMPERATURE, Inputs
from vmf_heads._matmul import autocast_dtype, mm_float32, without_autocast
from vmf_heads._memory import rows_per_chunk


def student_epilogue(products: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(softmax (c, K), logsumexp (c,)) of the logits products + b."""
    logits = products + b
    log_sum = logits.logsumexp(dim=1)
    return torch.exp(logits - log_sum[:, None]).to(dtype), log_sum


def teacher_epilogue(
    products: Tensor, teacher_b: Tensor, center: Tensor, b: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(targets (c, K), their mean of the student's b (c,), statistics (K,)) of the logits products + teacher_b."""
    logits = products + teacher_b
    targets = torch.softmax(logits - center, dim=1)
    return targets.to(dtype), (targets * b).sum(dim=1), torch.log_softmax(logits, dim=1).logsumexp(dim=0)


def difference_epilogue(
    products: Tensor, b: Tensor, teacher_products: Tensor, teacher_b: Tensor, center: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(softmax - targets (c, K), cross-entropy (c,), statistics (K,)), where row i is trained towards row i."""
    logits, log_p = teacher_products + teacher_b, torch.log_softmax(products + b, dim=1)
    targets = torch.softmax(logits - center, dim=1)
    cross_entropy = -(targets * log_p).sum(dim=1)
    return (log_p.exp() - targets).to(dtype), cross_entropy, torch.log_softmax(logits, dim=1).logsumexp(dim=0)


@dataclass(frozen=True)
class Epilogues:
    """The three epilogues, as they are or compiled."""

    student: Callable[..., tuple[Tensor, ...]] = student_epilogue
    teacher: Callable[..., tuple[Tensor, ...]] = teacher_epilogue
    difference: Callable[..., tuple[Tensor, ...]] = difference_epilogue


EAGER = Epilogues()


@cache
def compiled_epilogues() -> Epilogues:
    """The same, compiled when they are first called; with fullgraph, because a part left eager would go unnoticed."""
    return Epilogues(
        *(torch.compile(each, fullgraph=True) for each in (EAGER.student, EAGER.teacher, EAGER.difference))
    )


def by_chunks(inputs: Inputs, *, compiled: bool = False, chunk_rows: int | None = None) -> Tensor:
    """DINO-vMF's loss, to call backward on; `chunk_rows` rows at a time, by default as many as the library takes."""
    b, teacher_b = inputs.log_normalizers()
    w = inputs.prototypes()
    rows = rows_per_chunk(len(w), w.device) if chunk_rows is None else chunk_rows
    epilogues = compiled_epilogues() if compiled else EAGER
    return _ByChunks.apply(inputs.y, w, b, inputs, teacher_b, epilogues, rows)


class _ByChunks(Function):
    """Loss and gradients in the forward pass; the formulas are those of docs/loss.md."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, w: Tensor, b: Tensor, inputs: Inputs, teacher_b: Tensor, epilogues: Epilogues, rows: int
    ) -> Tensor:
        half = autocast_dtype(y.device)
        with without_autocast(y.device):
            chunks = _Chunks(y, w, b.detach(), inputs, teacher_b, epilogues, rows, y.dtype if half is None else half)
            loss = chunks.same_position() if not inputs.size.ncrops else chunks.any_position()
        ctx.save_for_backward(chunks.dy, chunks.dw, chunks.db)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *(grad * gradient for gradient in ctx.saved_tensors), None, None, None, None


class _Chunks:
    """The two passes over chunks; `dy`, `dw` and `db` are the gradients, `statistics` those of Eq. 9."""

    def __init__(
        self,
        y: Tensor,
        w: Tensor,
        b: Tensor,
        inputs: Inputs,
        teacher_b: Tensor,
        epilogues: Epilogues,
        rows: int,
        dtype: torch.dtype,
    ) -> None:
        self.y, self.b, self.teacher_b, self.center = y, b, teacher_b, inputs.center[0]
        self.teacher_y = inputs.teacher_y
        self.w, self.teacher_w = w.to(dtype), inputs.teacher_prototypes().to(dtype)
        self.teacher_rows, self.weights = pairs(inputs)
        self.epilogues, self.rows, self.dtype = epilogues, rows, dtype
        self.dy, self.dw, self.db = torch.zeros_like(y), torch.zeros_like(w), torch.zeros_like(b)
        self.statistics = torch.full_like(b, -torch.inf)

    def same_position(self) -> Tensor:
        weight, losses = self.weights[0, 0], []
        for chunk in self._chunks(len(self.y)):
            difference, cross_entropy, statistics = self.epilogues.difference(
                self._student_products(chunk),
                self.b,
                self._teacher_products(chunk),
                self.teacher_b,
                self.center,
                self.dtype,
            )
            losses.append(cross_entropy)
            self.dy[chunk] = mm_float32(difference, self.w) * (weight / STUDENT_TEMPERATURE)
            self._add_dw(difference, self.y[chunk] * (weight / STUDENT_TEMPERATURE))
            self._add_db(difference, weight.expand(len(difference)))
            self._add(statistics)
        return torch.cat(losses).sum() * weight

    def any_position(self) -> Tensor:
        tau, nt = STUDENT_TEMPERATURE, len(self.teacher_y)
        row_weight, target_weight = self.weights.sum(dim=1), self.y.new_zeros(nt)
        target_features = torch.zeros_like(self.teacher_y)
        for m in range(self.teacher_rows.shape[1]):
            target_weight.index_add_(0, self.teacher_rows[:, m], self.weights[:, m])
            target_features.index_add_(0, self.teacher_rows[:, m], self.weights[:, m : m + 1] * self.y)

        log_sums, mean_prototypes, mean_b = [], [], []
        for chunk in self._chunks(len(self.y)):
            p, log_sum = self.epilogues.student(self._student_products(chunk), self.b, self.dtype)
            log_sums.append(log_sum)
            self.dy[chunk] = mm_float32(p, self.w) * (row_weight[chunk, None] / tau)
            self._add_dw(p, self.y[chunk] * (row_weight[chunk, None] / tau))
            self._add_db(p, row_weight[chunk])
        for chunk in self._chunks(nt):
            t, mean, statistics = self.epilogues.teacher(
                self._teacher_products(chunk), self.teacher_b, self.center, self.b, self.dtype
            )
            mean_b.append(mean)
            mean_prototypes.append(mm_float32(t, self.w))
            self._add_dw(t, target_features[chunk] / -tau)
            self._add_db(t, -target_weight[chunk])
            self._add(statistics)
        average = torch.cat(mean_prototypes)
        for m in range(self.teacher_rows.shape[1]):
            self.dy -= self.weights[:, m : m + 1] / tau * average[self.teacher_rows[:, m]]
        towards = (target_features * average).sum() / tau + target_weight @ torch.cat(mean_b)
        return row_weight @ torch.cat(log_sums) - towards

    def _chunks(self, n: int) -> list[slice]:
        rows = math.ceil(n / math.ceil(n / self.rows))  # as few as there must be, almost equally long
        return [slice(start, min(start + rows, n)) for start in range(0, n, rows)]

    def _student_products(self, chunk: slice) -> Tensor:
        return mm_float32((self.y[chunk] / STUDENT_TEMPERATURE).to(self.dtype), self.w.T)

    def _teacher_products(self, chunk: slice) -> Tensor:
        return mm_float32((self.teacher_y[chunk] / TEACHER_TEMPERATURE).to(self.dtype), self.teacher_w.T)

    def _add_dw(self, p: Tensor, x: Tensor) -> None:
        if self.dtype == torch.float32:
            self.dw.addmm_(p.T, x)
        else:
            self.dw += mm_float32(p.T, x.to(self.dtype))

    def _add_db(self, p: Tensor, weight: Tensor) -> None:
        largest = weight.abs().amax()  # DINO's weights are 1 and 1/2 of it, which half precision holds exactly
        self.db += mm_float32((weight / largest).to(self.dtype)[None], p)[0] * largest

    def _add(self, statistics: Tensor) -> None:
        self.statistics = torch.logaddexp(self.statistics, statistics)
