"""Are the prototypes collapsing? Their duplicates, their use, their concentrations and the entropies, in one call."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._checks import positive
from ._distributed import whole
from ._duplicates import count_duplicates
from ._matmul import at_least_float32, without_autocast
from ._memory import rows_per_chunk
from ._unit_rows import unit_rows
from .centering import teacher_targets
from .head import PrototypeHead, find_head

__all__ = ["PrototypeReport", "prototype_report"]

KAPPA_QUANTILES = {"min": 0.0, "p05": 0.05, "p50": 0.5, "p95": 0.95, "max": 1.0}
# From these on a number is named in the verdict.
LARGE_SET = 0.1  # of the prototypes
ONE_TAKES_ALL = 0.5  # of the rows
SAME_TARGETS = 0.05  # mutual information of row and prototype, as a share of its largest possible value
SAME_FEATURES = 0.99  # length of the mean of unit vectors


@dataclass(frozen=True)
class PrototypeReport:
    """What `prototype_report` found. Print it, or log `as_dict()`; None stands for what the arguments do not tell."""

    prototypes: int  # K
    dim: int  # p
    temperature: float  # that of kappa and of the entropies
    unique: dict[float, int]  # by cosine threshold
    largest_set: dict[float, int]  # by cosine threshold: prototypes in the largest set of duplicates
    kappa: dict[str, float]  # quantiles of ||w|| / temperature: min, p05, p50, p95, max
    rows: int | None = None  # N
    used: int | None = None  # prototypes that are the most probable one of some row
    top_share: float | None = None  # share of the rows that the most used prototype has, in [0, 1]
    target_entropy: float | None = None  # nats: mean entropy of the rows' probabilities, 0 to ln K
    marginal_entropy: float | None = None  # nats: entropy of their mean, target_entropy to ln K
    mean_length: float | None = None  # ||mean of y||, 0 to 1; 1: all features are the same
    void: int | None = None  # prototypes that no row chooses, with a cosine to -mean(y) above void_threshold
    void_threshold: float = 0.9

    @property
    def verdict(self) -> str:
        """What the numbers say about collapse, in one or a few plain sentences."""
        found = [*self._of_prototypes(), *self._of_data()]
        return " ".join(found) or ("No large set of duplicates." if self.rows is None else "No sign of collapse.")

    def as_dict(self) -> dict[str, float]:
        """Flat names and numbers for a logger, such as `unique@0.9`, `kappa_p50` and `void`, without unknown ones.

        Entropies also come as `target_entropy_share` and `marginal_entropy_share`, of ln K.
        """
        numbers: dict[str, float] = {}
        for name, value in asdict(self).items():
            if isinstance(value, dict):
                joint = "_" if name == "kappa" else "@"
                numbers |= {f"{name}{joint}{key}": number for key, number in value.items()}
            elif value is not None:
                numbers[name] = value
                if name.endswith("entropy"):
                    numbers[f"{name}_share"] = self._share(value)
        return numbers

    def __str__(self) -> str:
        lines = [f"{self.prototypes} prototypes of dimension {self.dim}" + (f", {self.rows} rows" if self.rows else "")]
        for threshold, unique in self.unique.items():
            largest = f"largest set of duplicates {self._count(self.largest_set[threshold])}"
            lines.append(f"at cosine {threshold:g}: {self._count(unique)} unique, {largest}")
        if self.void is not None:
            where = f"cosine with -mean(y) above {self.void_threshold:g}, never chosen"
            lines.append(f"void: {self._count(self.void)}, {where}; length of mean(y) {self.mean_length:.3f}")
        if self.used is not None:
            lines.append(f"used: {self._count(self.used)}, the most used one by {self.top_share:.1%} of the rows")
        quantiles = ", ".join(f"{name} {value:.4g}" for name, value in self.kappa.items())
        lines.append(f"kappa at temperature {self.temperature:g}: {quantiles}")
        if self.target_entropy is not None and self.marginal_entropy is not None:
            of_targets, of_mean = map(self._nats, (self.target_entropy, self.marginal_entropy))
            lines.append(f"entropy of the targets {of_targets}, of their mean {of_mean}")
        return "\n  ".join(lines) + f"\n{self.verdict}"

    def _of_prototypes(self) -> list[str]:
        if self.void is not None and self.void >= LARGE_SET * self.prototypes:
            return [
                f"{self.void / self.prototypes:.0%} of the prototypes point straight away from the data and no row "
                "chooses them: a void set."
            ]
        threshold = min(self.largest_set, key=lambda value: abs(value - 0.9))  # the paper's, or the nearest
        share = self.largest_set[threshold] / self.prototypes
        if share < LARGE_SET or self.largest_set[threshold] == 1:
            return []
        where = "" if self.void is not None else "; features would tell whether they point away from the data"
        return [f"{share:.0%} of the prototypes are duplicates of one another{where}."]

    def _of_data(self) -> list[str]:
        if self.rows is None or self.rows < 2:
            return []
        found = []
        if self.mean_length is not None and self.mean_length > SAME_FEATURES:
            found.append("The features are nearly the same in all rows: collapsed.")
        if self.top_share is not None and self.top_share >= ONE_TAKES_ALL and self.prototypes > 2:
            found.append(f"One prototype takes {self.top_share:.0%} of the rows.")
        if self.target_entropy is not None and self.marginal_entropy is not None:
            most = math.log(min(self.prototypes, self.rows))
            if self.marginal_entropy - self.target_entropy < SAME_TARGETS * most:
                found.append("The targets hardly differ between rows: collapsed, or at the start of training.")
        return found

    def _share(self, nats: float) -> float:
        return nats / math.log(self.prototypes) if self.prototypes > 1 else 0.0

    def _nats(self, nats: float) -> str:
        return f"{nats:.2f} nats ({self._share(nats):.2f} ln K)"

    def _count(self, number: int) -> str:
        return f"{number} ({number / self.prototypes:.1%})"


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

    Reference: Govindarajan et al., ICLR 2023, section 5.2 and appendix A.3.

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
    quantiles = _quantiles(norms / tau, list(KAPPA_QUANTILES.values()))
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
    for name, term in (("log_normalizer", log_normalizer), ("log_center", log_center)):
        if term is not None and term.shape != norms.shape:
            raise ValueError(f"`{name}` (of shape {tuple(term.shape)}) must have shape ({total},)")
    terms = {"log_normalizer": _like(log_normalizer, norms), "log_center": _like(log_center, norms)}
    rows = rows_per_chunk(total, weight.device, buffers=3)
    with without_autocast(weight.device):
        if scores is not None:
            _check_shape("scores", scores, total)
            chunks = (teacher_targets(chunk.to(weight), tau, **terms) for chunk in scores.split(rows))
            return replace(report, **_use(chunks, norms)[1])
        if features is None:
            return report
        _check_shape("features", features, dim)
        unit_rows("features", features)
        chunks = (teacher_targets(chunk.to(weight) @ weight.T, tau, **terms) for chunk in features.split(rows))
        counts, use = _use(chunks, norms)
        mean = features.mean(dim=0, dtype=weight.dtype).to(weight.device)
        away = F.normalize(weight, dim=1) @ -F.normalize(mean, dim=0) > void_threshold
    return replace(report, **use, mean_length=mean.norm().item(), void=int((away & (counts == 0)).sum()))


def _use(targets: Iterable[Tensor], like: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """How many rows choose each prototype (K,), and what the report says of it, from chunks of targets (rows, K).

    `like` (K,) gives the shape and the device.
    """
    counts = torch.zeros_like(like, dtype=torch.int64)
    marginal = torch.zeros_like(like, dtype=torch.float64)
    entropy = marginal.new_zeros(())
    for chunk in targets:
        counts += torch.bincount(chunk.argmax(dim=1), minlength=len(like))
        entropy += torch.special.entr(chunk).sum(dtype=torch.float64)
        marginal += chunk.sum(dim=0, dtype=torch.float64)
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


def _quantiles(values: Tensor, shares: Sequence[float]) -> list[float]:
    """The quantiles of `values` (K,), as torch.quantile interpolates them, which takes no more than 2^24 numbers."""
    ordered = values.sort().values
    positions = [share * (len(values) - 1) for share in shares]
    below = ordered[[math.floor(position) for position in positions]]
    above = ordered[[math.ceil(position) for position in positions]]
    return torch.lerp(below, above, values.new_tensor([position % 1 for position in positions])).tolist()


def _resolve(prototypes: Tensor | nn.Module) -> tuple[Tensor, PrototypeHead | None]:
    """The prototypes (K, p), in float32 unless they are float64, and the head that they come from."""
    if isinstance(prototypes, Tensor):
        return at_least_float32(whole(prototypes, "`prototypes`")), None
    head = find_head(prototypes, "prototypes")
    return head.last_layer.gathered(), head


def _like(tensor: Tensor | None, other: Tensor) -> Tensor | None:
    return None if tensor is None else tensor.to(other)


def _check_shape(name: str, tensor: Tensor, columns: int | None) -> torch.Size:
    matrix = tensor.dim() == 2 and len(tensor) > 0
    if not matrix or (tensor.shape[1] < 2 if columns is None else tensor.shape[1] != columns):
        wanted = "p >= 2" if columns is None else columns
        raise ValueError(f"`{name}` (of shape {tuple(tensor.shape)}) must have shape (rows >= 1, {wanted})")
    return tensor.shape


def _check_cosines(name: str, values: Sequence[float]) -> None:
    if not values or not all(-1 < value < 1 for value in values):
        raise ValueError(f"`{name}` (={', '.join(map(str, values))}) must lie between -1 and 1")
