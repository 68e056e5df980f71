"""The learned mixture: prototypes in use, duplicates, void set, kappa (section 5.2, Table 4, Figures 2, 6 and 7)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

from evaluators.knn import predict
from evaluators.protocol import Evaluation, Metric
from evaluators.prototypes.choices import Choices, by_kappa, choose
from evaluators.prototypes.components import Components, open_components
from evaluators.prototypes.tables import BY_KAPPA, DUPLICATES, PROTOTYPES, write_table
from runtime.distributed import is_main
from vmf_heads import prototype_report

COSINE = 0.9
"""Table 4 counts prototypes as duplicates above this cosine."""


@dataclass(frozen=True)
class PrototypesOptions:
    """Section 5.2 of the paper. Tables, and charts of them, go to OUTPUT/prototypes/."""

    images: int | None = None
    """At most so many train images, evenly spaced, decide which prototypes are used; by default all of them."""
    thresholds: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
    """Cosines above which prototypes are duplicates (Figures 6 and 7)."""
    void: float = 0.9
    """Cosine to -mean(y) above which a prototype that no image chooses is void."""
    k: int = 10
    """Neighbours of the kNN in Figure 2; the paper finds 10 best for DINO-vMF."""
    ranges: int = 5
    """Into how many ranges of percentiles of kappa the evaluated images are divided for Figure 2."""
    normalizer: Literal["none", "vmf"] = "none"
    """Whether the head in a .pth file was trained with log C_p in the logits."""
    temperature: float = 0.1
    """The student's temperature with which the head in a .pth file was trained."""

    def __post_init__(self) -> None:
        for name in ("images", "k", "ranges"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` (={value}) must be at least 1")


def prototypes(evaluation: Evaluation, options: PrototypesOptions = PrototypesOptions()) -> Iterator[Metric]:
    """Yield statistics of the teacher's prototypes over the un-augmented train split.

    - `unique`, `largest_set`: prototypes that repeat no other, and the largest set of duplicates, at a cosine of 0.9
      (Table 4) and, as `unique@0.5` and so on, at the other thresholds (Figures 6 and 7).
    - `kappa_*`: quantiles of kappa = ||w|| / tau_s, with the student's temperature.

    And, where there are images:

    - `used_scores`, `used_logits`, `used_targets`: how many are the largest score <w_k, y> of some image, the largest
      logit of Eq. 6, the largest probability of some centred target (Eq. 7), which is what the student is taught.
    - `void`: those that have no image by their logit and point away from the mean of y; `mean_length` is ||mean of y||.
    - `target_entropy`, `marginal_entropy`: of the targets, and of their mean, in nats.
    - `top1@kappa_0-20` and so on: kNN accuracy of the evaluated split's images whose component, that of the largest
      logit, has a kappa in these percentiles (Figure 2). Images of one component stay together; where all kappa are
      equal there is nothing to divide.

    Raises NotApplicable when the checkpoint has no head.
    """
    components = open_components(evaluation, normalizer=options.normalizer, temperature=options.temperature)
    if evaluation.dataset is None:  # the prototypes alone, for instance of a downloaded checkpoint
        if is_main():
            yield from _of_prototypes(evaluation, components, None, options)
        return
    train, queries = evaluation.features("train"), evaluation.features(evaluation.split)
    correct = predict(train, queries, (options.k,))[options.k] == queries.labels  # the ranks share it
    if not is_main():
        return
    count = min(options.images or len(train.x), len(train.x))
    chosen = choose(components, train.x, np.unique(np.linspace(0, len(train.x) - 1, count).astype(int)))
    yield from _of_prototypes(evaluation, components, chosen, options)
    yield from _by_kappa(evaluation, components, queries.x, correct, options)


def _of_prototypes(
    evaluation: Evaluation, components: Components, chosen: Choices | None, options: PrototypesOptions
) -> Iterator[Metric]:
    thresholds = tuple(sorted({COSINE, *options.thresholds}))
    report = prototype_report(
        components.prototypes,
        None if chosen is None else chosen.y,
        temperature=components.temperature,
        log_normalizer=components.log_normalizer,
        thresholds=thresholds,
        void_threshold=options.void,
    )
    n: dict[str, Any] = {"split": ""} if chosen is None else {"n": len(chosen.y)}
    yield Metric("prototypes", report.prototypes, n)
    for name, choices in ({} if chosen is None else chosen.prototypes).items():
        yield Metric(f"used_{name}", len(choices.unique()), n)
    for name, value in report.kappa.items():
        yield Metric(f"kappa_{name}", value, n)
    for threshold in thresholds:
        at = "" if threshold == COSINE else f"@{threshold:g}"
        yield Metric(f"unique{at}", report.unique[threshold], n | {"cosine": threshold})
        yield Metric(f"largest_set{at}", report.largest_set[threshold], n | {"cosine": threshold})
    if chosen is not None:
        yield Metric("void", report.void, n | {"cosine": options.void})
        yield Metric("mean_length", report.mean_length, n)
        for name, value in chosen.entropies.items():
            yield Metric(name, value, n)
    folder = evaluation.output / "prototypes"
    sizes = [{"cosine": t, "unique": report.unique[t], "largest_set": report.largest_set[t]} for t in thresholds]
    write_table(folder / DUPLICATES, sizes)
    write_table(folder / PROTOTYPES, _per_prototype(components, chosen))


def _per_prototype(components: Components, chosen: Choices | None) -> Iterator[dict[str, Any]]:
    weight = components.prototypes
    columns = {"kappa": weight.norm(dim=1) / components.temperature}
    if chosen is not None:
        columns["cosine_to_minus_mean"] = F.normalize(weight, dim=1) @ -F.normalize(chosen.y.mean(dim=0), dim=0)
        for name, choices in chosen.prototypes.items():
            columns[f"images_by_{name}"] = torch.bincount(choices, minlength=len(weight))
    for number, values in enumerate(zip(*(column.tolist() for column in columns.values()), strict=True)):
        yield {"prototype": number, **dict(zip(columns, values, strict=True))}


def _by_kappa(
    evaluation: Evaluation, components: Components, x: np.ndarray, correct: np.ndarray, options: PrototypesOptions
) -> Iterator[Metric]:
    component = choose(components, x, np.arange(len(x))).prototypes["logits"].cpu().numpy()
    kappa = components.prototypes.norm(dim=1).cpu().numpy()[component] / components.temperature
    table = list(by_kappa(kappa, correct, options.ranges))
    for row in table:
        notes = {"split": evaluation.split, "k": options.k} | row
        yield Metric(f"top1@kappa_{notes.pop('percentiles')}", notes.pop("top1"), notes)
    folder = evaluation.output / "prototypes"
    write_table(folder / BY_KAPPA, table)
