"""What every evaluation protocol is given, an `Evaluation`, and what it yields, `Metric`s."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from evaluators.features.encoder import Encoder
    from training.run import Run


class Features(NamedTuple):
    """The features of one split, in the order of its images without the unreadable ones.

    `x` (N, D) is float32 or float16 and may be memory-mapped; `labels` (N,) int64 index `classes`.
    """

    x: np.ndarray
    labels: np.ndarray
    classes: list[str]

    def at_most(self, count: int) -> Features:
        """Return so many of the images, drawn with a fixed seed and in their order; all where there are no more."""
        if len(self.labels) <= count:
            return self
        rows = np.sort(np.random.default_rng(0).choice(len(self.labels), count, replace=False))
        return Features(self.x[rows], self.labels[rows], self.classes)


class Metric(NamedTuple):
    """One number of an evaluation; accuracies lie in [0, 1]. `options` are the settings and notes behind it.

    The options become fields of the metric's row in results.jsonl. Two of them replace what is there without them: "n",
    how many images (queries, objects) the number is a mean over, and "split", what it was measured on.
    """

    name: str
    value: float
    options: dict[str, Any] = {}  # noqa: RUF012 (never changed)
    predictions: np.ndarray | None = None  # (N,) predicted labels, for paired comparisons between features


FeaturesOf: TypeAlias = Callable[..., Features]
"""A call `features(split, kind="cls")` extracts features once, on all ranks. Protocols search or train on the
train split.

Kinds: "cls", the [CLS] token (B, D); "last4", the [CLS] tokens of the last four blocks (B, 4 D), as DINO's linear
protocol has it for ViT-S; "cls+mean_patch", the [CLS] token and the mean patch token (B, 2 D), as it has it for ViT-B;
"patches", all patch tokens one after the other (B, h*w*D).
"""


FeaturesElsewhere: TypeAlias = Callable[..., FeaturesOf]
"""A call with what `load_images` knows, (dataset, data), returns the features of other images by the same network and
settings. They are cropped and resized as those of the evaluated data are; with `whole=True` they are not cropped."""


@dataclass(frozen=True)
class Evaluation:
    """All that a protocol may use. Everything in it is the same on every rank."""

    encoder: Encoder | None
    """The network; None when raw pixels are evaluated."""
    features: FeaturesOf
    split: str
    """The split that is reported, "val" or "test"; settings are chosen on val."""
    data: Path | None
    """The folder or the hub set that the option --data names."""
    run: Run | None
    """The head, the centre and the recipe, where the checkpoint is a run of pretrain.py."""
    output: Path
    """Folder where a protocol may write tables, plots and predictions, on the main rank."""
    dataset: str | None = None
    """What `features` are of: load_images(dataset, split, data=data) gives the images, unreadable ones too."""
    features_elsewhere: FeaturesElsewhere | None = None
    """The features of other images; None where there are none of the data."""
    network: Encoder | None = None
    """That of the checkpoint, also where raw pixels are evaluated in its place: the sizes of images and patches."""


Evaluator: TypeAlias = Callable[[Evaluation, Any], Iterator[Metric]]
"""A call `evaluator(evaluation, options)` is made on every rank; the metrics of the main one are kept."""


class NotApplicable(ValueError):
    """Raised by a protocol that this checkpoint or these data cannot be evaluated with; the message says what it needs.

    `evaluate.py all` reports it and goes on.
    """
