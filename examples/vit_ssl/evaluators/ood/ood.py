"""Density as a score: out-of-distribution detection and difficulty, beside the usual scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from evaluators.knn import predict
from evaluators.ood.density import OwnMixture, Scores, own_mixture
from evaluators.ood.measures import rank_correlation, separation
from evaluators.ood.out_sets import KINDS, parse_out_sets
from evaluators.ood.scores import FittedScores, fit_scores, is_labelled
from evaluators.protocol import Evaluation, Metric, NotApplicable
from evaluators.prototypes.components import open_components
from runtime.distributed import is_main

NEIGHBOURS = 10
"""Of the kNN whose answers the difficulty is about, as in Figure 2; the paper finds 10 best for DINO-vMF."""


@dataclass(frozen=True)
class OodOptions:
    """Scores of being out of distribution, fitted to train images alone. Sets are NAME=DATA, where DATA is photos,
    digits, a folder of class folders, or hub:NAME."""

    out: tuple[str, ...] = ()
    """Sets of other images, for instance --out digits textures=DTD/images. Of sets with splits --split is taken."""
    near: tuple[str, ...] = ()
    """Sets that are close to the data; the mean over them is reported, too."""
    far: tuple[str, ...] = ()
    """Sets that are far from the data; the mean over them is reported, too."""
    k: int = 50
    """Distance to the k-th nearest train image; 50 is OpenOOD's setting."""
    components: int | None = None
    """Components of the mixture that is fitted to the features; by default the number, a power of 2, under which
    held-out train images have the highest density."""
    images: int = 50_000
    """At most so many train images, drawn at random, are what scores are fitted to."""
    normalizer: Literal["none", "vmf"] = "none"
    """Whether the head in a .pth file was trained with log C_p in the logits."""
    temperature: float = 0.1
    """The student's temperature with which the head in a .pth file was trained."""

    def __post_init__(self) -> None:
        for name, low in {"k": 1, "components": 1, "images": 10}.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"`{name}` (={value}) must be at least {low}")


def ood(evaluation: Evaluation, options: OodOptions = OodOptions()) -> Iterator[Metric]:
    """Yield how well each score of `scores.IN_WORDS` tells the evaluated split from other sets, and from hard images.

    - `auroc_SCORE@SET`, `fpr95_SCORE@SET`: see `measures.separation`; with SET `near` or `far` the means over those.
    - `difficulty_SCORE`: rank correlation of the score with whether kNN (k = 10) is right, over the evaluated split;
      where images have labels.

    Images of other sets are cropped and resized as those of the data.

    Raises:
        NotApplicable: no other set is named, or there are no images.
        ValueError: an option is out of range.
        FileNotFoundError: there is no such set.
    """
    sets = parse_out_sets({kind: getattr(options, kind) for kind in KINDS})
    if not sets:
        raise NotApplicable("it needs images of another kind: --out, --near or --far with NAME=DATA")
    train, inside = evaluation.features("train").at_most(options.images), evaluation.features(evaluation.split)
    outside = {
        found.name: evaluation.features_elsewhere(found.dataset, found.data)(found.split(evaluation.split)).x
        for found in sets
    }
    scores = fit_scores(train, _own(evaluation, options), k=options.k, num_components=options.components)
    right = predict(train, inside, (NEIGHBOURS,))[NEIGHBOURS] == inside.labels if is_labelled(train.labels) else None
    if not is_main():
        return
    kinds = {found.name: found.kind for found in sets}
    of_data = scores(inside.x)
    yield from compare(scores, of_data, {name: scores(x) for name, x in outside.items()}, kinds)
    if right is not None:
        yield from difficulty(scores, of_data, right)


def compare(
    scores: FittedScores, inside: Scores, outside: Mapping[str, Scores], kinds: Mapping[str, str]
) -> Iterator[Metric]:
    """Yield both measures of each score and set, and their means over the near and over the far sets."""
    for score, values in inside.items():
        notes = scores.notes.get(score, {}) | {"score": score}
        found = {name: separation(values, others[score]) for name, others in outside.items()}
        for name, one in found.items():
            about: dict[str, Any] = notes | {"out": name, "kind": kinds[name], "n_out": len(outside[name][score])}
            yield Metric(f"auroc_{score}@{name}", one.auroc, about)
            yield Metric(f"fpr95_{score}@{name}", one.fpr95, about)
        for kind in ("near", "far"):
            those = [one for name, one in found.items() if kinds[name] == kind]
            if those:
                about = notes | {"out": kind, "kind": kind, "sets": len(those)}
                yield Metric(f"auroc_{score}@{kind}", float(np.mean([one.auroc for one in those])), about)
                yield Metric(f"fpr95_{score}@{kind}", float(np.mean([one.fpr95 for one in those])), about)


def difficulty(scores: FittedScores, inside: Scores, right: np.ndarray) -> Iterator[Metric]:
    """Yield the rank correlation of each score with which answers are right; none where one of them is constant."""
    for score, values in inside.items():
        if (value := rank_correlation(values, right)) is not None:
            of_answers = {"score": score, "neighbours": NEIGHBOURS, "top1": float(right.mean())}
            about = scores.notes.get(score, {}) | of_answers
            yield Metric(f"difficulty_{score}", value, about)


def _own(evaluation: Evaluation, options: OodOptions) -> OwnMixture | None:
    try:
        components = open_components(evaluation, normalizer=options.normalizer, temperature=options.temperature)
    except NotApplicable:
        return None  # a backbone alone
    return own_mixture(components)
