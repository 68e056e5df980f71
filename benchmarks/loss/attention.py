"""The fused loss made of attention kernels, for comparison: flex_attention and scaled dot-product attention.

Student rows as queries, prototypes as keys and values and log C_p as a bias of the keys give log-sum-exp and P W in one
call. With queries and keys exchanged, and minus the log-sum-exp as the bias, a second call gives P' Y; the teacher
needs both, too. Every logit is computed twice, but nothing has to be written between two kernels.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from benchmarks.loss.inputs import STUDENT_TEMPERATURE, TEACHER_TEMPERATURE, Inputs
from vmf_heads.cross_entropy import dino_pairs

Attention = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@cache
def _compiled_flex_attention() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """(softmax(q k' + bias) v, logsumexp of the same), (Nq, p) and (Nq,); compiled on CUDA. Needs torch 2.9."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    def biased(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + bias[key]

    attention = _compiled_flex_attention() if queries.is_cuda else flex_attention
    q, k, v = _operands(queries, keys, values)
    result, aux = attention(q, k, v, score_mod=biased, scale=1.0, return_aux=AuxRequest(lse=True))
    return result[0, 0].float(), aux.lse[0, 0].float()


def sdpa(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """As `flex`, by the kernels behind scaled_dot_product_attention, which alone return the logsumexp.

    Under autocast they round the bias to half precision, too, which is less exact than what the others do.
    """
    q, k, v = _operands(queries, keys, values)
    mask = bias.to(q.dtype).expand(1, 1, len(queries), len(keys))
    if queries.is_cuda:
        kernel = torch.ops.aten._scaled_dot_product_efficient_attention
        result, lse = kernel(q, k, v, mask, compute_log_sumexp=True, scale=1.0)[:2]
    else:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        result, lse = kernel(q, k, v, attn_mask=mask, scale=1.0)
    return result[0, 0].float(), lse[0, 0, : len(queries)].float()


def by_attention(inputs: Inputs, attention: Attention) -> Tensor:
    """DINO-vMF's loss, to call backward on."""
    bias, teacher_bias = inputs.log_normalizers()
    return _ByAttention.apply(inputs.y, inputs.prototypes(), bias, inputs, teacher_bias, attention)


class _ByAttention(Function):
    """Loss and gradients in the forward pass; the formulas are those of docs/loss.md."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, w: Tensor, b: Tensor, inputs: Inputs, teacher_bias: Tensor, attention: Attention
    ) -> Tensor:
        b = b.detach()  # the tracer of flex_attention looks for the gradients of what its bias reads
        tau, teacher_w = STUDENT_TEMPERATURE, inputs.teacher_prototypes()
        q, teacher_q = y / tau, inputs.teacher_y / TEACHER_TEMPERATURE
        teacher_rows, weights = pairs(inputs)
        row_weight, target_weight = weights.sum(dim=1), y.new_zeros(len(teacher_q))
        target_features = torch.zeros_like(teacher_q)
        for m in range(teacher_rows.shape[1]):
            target_weight.index_add_(0, teacher_rows[:, m], weights[:, m])
            target_features.index_add_(0, teacher_rows[:, m], weights[:, m : m + 1] * y)

        average, lse = attention(q, w, w, b)  # P W
        features, log_p = attention(w, q, y, row_weight.log() - lse)
        p = torch.exp(log_p + b)  # P' u
        offset = teacher_bias - inputs.center[0]
        teacher_average, teacher_lse = attention(teacher_q, teacher_w, w, offset)  # T W
        mean = target_features / target_weight[:, None]
        teacher_features, log_t = attention(teacher_w, teacher_q, mean, target_weight.log() - teacher_lse)
        t = torch.exp(log_t + offset)  # T' of the weights
        _, statistics_lse = attention(teacher_q, teacher_w, teacher_w, teacher_bias)
        attention(teacher_w, teacher_q, inputs.teacher_y, -statistics_lse)  # log_sum, but for adding the bias

        dy = row_weight[:, None] * average
        for m in range(teacher_rows.shape[1]):
            dy -= weights[:, m : m + 1] * teacher_average[teacher_rows[:, m]]
        ctx.save_for_backward(dy / tau, (p[:, None] * features - t[:, None] * teacher_features) / tau, p - t)
        return row_weight @ lse - (target_features * teacher_average).sum() / tau - b @ t

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *(grad * gradient for gradient in ctx.saved_tensors), None, None, None


def pairs(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Teacher rows and weights (Ns, M) as `fused` has them; where there is none the teacher row is 0, of weight 0."""
    size, device = inputs.size, inputs.y.device
    if not size.ncrops:
        return torch.arange(len(inputs.y), device=device)[:, None], torch.full(
            (len(inputs.y), 1), 1 / size.images, device=device
        )
    teacher_rows, weights = dino_pairs(size.images, size.ncrops, device=device)
    return teacher_rows.clamp(min=0), weights.float().masked_fill(teacher_rows < 0, 0)


def _operands(*matrices: Tensor) -> list[Tensor]:
    """Each as one head of one batch, in the autocast dtype where there is autocast."""
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else matrices[0].dtype
    return [matrix.detach().to(dtype)[None, None] for matrix in matrices]
