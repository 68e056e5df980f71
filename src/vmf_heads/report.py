"""Are the prototypes collapsing? Their duplicates, their use, their concentrations and the entropies, in one call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._checks import positive
from ._distributed import is_sharded
from ._duplicates import count_duplicates
from ._findings import PrototypeReport
from ._matmul import at_least_float32, without_autocast
from .head import VMFPrototypeHead

__all__ = ["PrototypeReport", "prototype_report"]

KAPPA_QUANTILES = {"min": 0.0, "p05": 0.05, "p50": 0.5, "p95": 0.95, "max": 1.0}
# Rows are taken in chunks of about so many logits: 64 MiB of float32 at a time.
_CHUNK_ELEMENTS = 2**24


@torch.no_grad()
def prototype_report(
    prototypes: Tensor | nn.Module,
    features: Tensor | None = None,
    *,
    scores: Tensor | None = None,
    temperature: float | None = None,
    log_normalizer: Tensor | None = None,
    log_center: Tensor | None = None,
    thresholds: Sequence[float] = (0.9,),
    void_threshold: float = 0.9,
) -> PrototypeReport:
    """How many prototypes differ, how many are used, whether some lie in a void, and how sharp the targets are.

    Two prototypes are duplicates where their cosine exceeds a threshold. Taken in order, a prototype that is no
    duplicate of an earlier unique one is unique, and its set holds itself and those of its duplicates that are in no
    earlier set. A void set, in the paper, is a large one that points away from the mean of the features and
    that no image chooses. A row chooses the prototype of the largest probability under::

        softmax(<w, y> / temperature + log_normalizer - log_center)

    Args:
        prototypes: w (K, p), or a module with one `VMFPrototypeHead` inside, also in DDP, compile and FSDP2 wrappers.
            Under FSDP2 the prototypes are gathered, so every rank must call.
        features: y (N, p), unit vectors; some thousand, of different images. Those of other ranks are not asked for.
        scores: <w, y> (N, K), where these are at hand and the features are not; void sets then stay unknown.
        temperature: that of the probabilities, and of kappa = ||w|| / temperature. None: the head's own, or 0.1.
        log_normalizer: log C_p(kappa) (K,) up to a constant. None: the head's own, or 0.
        log_center: the centre of Eq. 7 (K,), which makes the probabilities the targets that a teacher gives. (DINO's
            own `center` is this times the temperature.) None: 0.
        thresholds: cosines above which two prototypes are duplicates, each between -1 and 1.
        void_threshold: cosine to -mean(y) above which a prototype that no row chooses counts as void.

    Returns:
        A `PrototypeReport`: print it, read its `verdict`, log its `as_dict()`. Computed in float32 (float64 for
            float64 prototypes) without any tensor of (K, K) or, from features, (N, K).

    Raises:
        ValueError, TypeError: a shape or value is out of its range, something is not finite, or the module holds no
            head or several; each message names the argument and what is allowed.

    Source: Govindarajan et al., ICLR 2023, section 5.2 and appendix A.3.

    >>> import torch
    >>> from vmf_heads import prototype_report
    >>> features = torch.tensor([[0.8, 0.6, 0.0], [0.8, 0.0, 0.6], [0.8, -0.6, 0.0]])
    >>> void = -features.mean(dim=0).expand(5, 3)
    >>> report = prototype_report(torch.cat([features, void]), features)
    >>> report.unique, report.largest_set, report.void
    ({0.9: 4}, {0.9: 5}, 5)
    >>> print(report.verdict)
    62% of the prototypes point straight away from the data and no row chooses them: a void set.
    """
    _check_cosines("thresholds", thresholds)
    _check_cosines("void_threshold", [void_threshold])
    if features is not None and scores is not None:
        raise ValueError("`features` and `scores` must not both be given: the scores follow from the features")
    weight, head = _resolve(prototypes)
    total, dim = _check_shape("prototypes", weight, None)
    if not weight.isfinite().all():
        raise ValueError("`prototypes` must be finite, but some are inf or NaN: this training has diverged")
    if temperature is None:
        temperature = 0.1 if head is None else head.temperature
    tau = positive("temperature", temperature)

    norms = weight.norm(dim=1)
    quantiles = torch.quantile(norms / tau, norms.new_tensor(list(KAPPA_QUANTILES.values()))).tolist()
    duplicates = dict(zip(thresholds, count_duplicates(weight, thresholds), strict=True))
    report = PrototypeReport(
        prototypes=total,
        dim=dim,
        temperature=tau,
        unique={threshold: found.unique for threshold, found in duplicates.items()},
        largest_set={threshold: found.largest_set for threshold, found in duplicates.items()},
        kappa=dict(zip(KAPPA_QUANTILES, quantiles, strict=True)),
        void_threshold=void_threshold,
    )

    if log_normalizer is None and head is not None:
        log_normalizer = head.log_normalizer(tau, norms)
    bias = torch.zeros_like(norms)
    for name, term, sign in (("log_normalizer", log_normalizer, 1), ("log_center", log_center, -1)):
        if term is not None:
            if term.shape != bias.shape:
                raise ValueError(f"`{name}` (of shape {tuple(term.shape)}) must have shape ({total},)")
            bias += sign * term.to(bias)
    with without_autocast(weight.device):
        if scores is not None:
            _check_shape("scores", scores, total)
            return replace(report, **_use(scores.split(_chunk_rows(total)), bias, tau)[1])
        if features is None:
            return report
        _check_shape("features", features, dim)
        chunks = (chunk.to(weight) @ weight.T for chunk in features.split(_chunk_rows(total)))
        counts, use = _use(chunks, bias, tau)
        mean = features.mean(dim=0, dtype=weight.dtype).to(weight.device)
        away = F.normalize(weight, dim=1) @ -F.normalize(mean, dim=0) > void_threshold
    return replace(report, **use, mean_length=mean.norm().item(), void=int((away & (counts == 0)).sum()))


def _use(chunks: Iterable[Tensor], bias: Tensor, temperature: float) -> tuple[Tensor, dict[str, Any]]:
    """How many rows choose each prototype (K,), and what the report says of it, from chunks of scores (rows, K)."""
    counts = torch.zeros_like(bias, dtype=torch.int64)
    marginal = torch.zeros_like(bias, dtype=torch.float64)
    entropy = marginal.new_zeros(())
    for chunk in chunks:
        logits = chunk.to(bias) / temperature + bias
        counts += torch.bincount(logits.argmax(dim=1), minlength=len(bias))
        probabilities = torch.softmax(logits, dim=1)
        entropy += torch.special.entr(probabilities).sum(dtype=torch.float64)
        marginal += probabilities.sum(dim=0, dtype=torch.float64)
    if not entropy.isfinite():
        raise ValueError("`features` or `scores` must be finite, but some are inf or NaN: this training has diverged")
    rows = int(counts.sum())
    return counts, {
        "rows": rows,
        "used": int((counts > 0).sum()),
        "top_share": int(counts.max()) / rows,
        "target_entropy": entropy.item() / rows,
        "marginal_entropy": torch.special.entr(marginal / rows).sum().item(),
    }


def _chunk_rows(total: int) -> int:
    return max(1, _CHUNK_ELEMENTS // total)


def _resolve(prototypes: Tensor | nn.Module) -> tuple[Tensor, VMFPrototypeHead | None]:
    """The prototypes (K, p), in float32 unless they are float64, and the head that they come from."""
    if isinstance(prototypes, Tensor):
        return at_least_float32(_whole(prototypes)), None
    heads = [module for module in prototypes.modules() if isinstance(module, VMFPrototypeHead)]
    if len(heads) != 1:
        raise ValueError(
            f"`prototypes` (a {type(prototypes).__name__}) must contain exactly one VMFPrototypeHead, "
            f"not {len(heads)}: pass the head itself, or its prototypes as a tensor (K, p)"
        )
    layer = heads[0].last_layer
    norms, directions = (at_least_float32(_whole(part)) for part in (layer.weight_g, layer.weight_v))
    return norms * F.normalize(directions, dim=1), heads[0]


def _whole(tensor: Tensor) -> Tensor:
    """`tensor`, gathered from all ranks where FSDP2 shards it."""
    if hasattr(tensor, "full_tensor"):
        gathered: Tensor = tensor.full_tensor()
        return gathered
    if is_sharded(tensor):
        raise ValueError(
            "`prototypes` must be whole, and here FSDP1 shards them: call inside "
            "FullyShardedDataParallel.summon_full_params"
        )
    return tensor


def _check_shape(name: str, tensor: Tensor, columns: int | None) -> torch.Size:
    matrix = tensor.dim() == 2 and len(tensor) > 0
    if not matrix or (tensor.shape[1] < 2 if columns is None else tensor.shape[1] != columns):
        wanted = "p >= 2" if columns is None else columns
        raise ValueError(f"`{name}` (of shape {tuple(tensor.shape)}) must have shape (rows >= 1, {wanted})")
    return tensor.shape


def _check_cosines(name: str, values: Sequence[float]) -> None:
    if not values or not all(-1 < value < 1 for value in values):
        raise ValueError(f"`{name}` (={', '.join(map(str, values))}) must lie between -1 and 1")
