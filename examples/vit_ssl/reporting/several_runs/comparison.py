"""Raw pixels, a random network and pretrained models side by side, image by image: what may be said, and how surely."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from reporting.demo_table import STANDARD_ERRORS, paired_difference

PIXELS, RANDOM = "raw pixels", "a random network"
PROTOCOLS = {"knn": "kNN", "linear": "linear probe"}
"""What a comparison may be of, and how it is called in a table."""


class Model(NamedTuple):
    """A model and which of the images it gets right."""

    name: str
    correct: Mapping[str, np.ndarray]
    """By protocol, (N,) bool in the same order of images for all models."""
    pretrained: bool = False


class Difference(NamedTuple):
    """How much better `a` is than `b`, as accuracies in [0, 1] on the same images."""

    a: str
    b: str
    protocol: str
    value: float
    error: float
    """Standard error over the images, of the mean of the differences of correctness (paired, as in McNemar's test)."""


def differences(models: Sequence[Model]) -> list[Difference]:
    """Return every pretrained model against what is not, then the pretrained ones against each other."""
    others = [model for model in models if not model.pretrained]
    pretrained = [model for model in models if model.pretrained]
    pairs = [*itertools.product(pretrained, others), *((b, a) for a, b in itertools.combinations(pretrained, 2))]
    return [
        Difference(a.name, b.name, protocol, *paired_difference(a.correct[protocol], b.correct[protocol]))
        for a, b in pairs
        for protocol in a.correct
    ]


def sentence(difference: Difference) -> str:
    """Return a difference in words: "raw pixels beat runs/mine by 14.0 ± 0.6 points (kNN)"."""
    a, b, protocol, value, error = difference
    how, size = PROTOCOLS[protocol], f"{100 * abs(value):.1f} ± {100 * error:.1f} points"
    if value == error == 0:
        return f"{a} and {b} are right on the same images ({how})"
    if abs(value) < STANDARD_ERRORS * error:
        sign = "+" if value >= 0 else "−"
        return f"{a} and {b} cannot be told apart: {sign}{size} ({how})"
    better, worse = (a, b) if value > 0 else (b, a)
    return f"{better} {'beat' if better == PIXELS else 'beats'} {worse} by {size} ({how})"


def table(models: Sequence[Model]) -> list[list[str]]:
    """Return accuracies in per cent with their standard errors over the images, and paired differences to the baselines
    and to the first pretrained model; the first line is the head.
    """
    protocols = list(models[0].correct)
    references = [model for model in models if not model.pretrained]
    if sum(model.pretrained for model in models) > 1:
        references.append(next(model for model in models if model.pretrained))
    head = [""]
    for protocol in protocols:
        head += [f"{PROTOCOLS[protocol]}, %", *(f"minus {reference.name}" for reference in references)]
    lines = [head]
    for position, model in enumerate(models):
        line = [model.name]
        for protocol in protocols:
            correct = model.correct[protocol]
            accuracy = float(correct.mean())
            line.append(f"{100 * accuracy:.1f} ± {100 * math.sqrt(accuracy * (1 - accuracy) / len(correct)):.1f}")
            for reference in references:
                later = position > models.index(reference)
                line.append(_points(correct, reference.correct[protocol]) if later else "")
        lines.append(line)
    return lines


def _points(ours: np.ndarray, theirs: np.ndarray) -> str:
    value, error = paired_difference(ours, theirs)
    return f"{100 * value:+.1f} ± {100 * error:.1f}".replace("-", "−")
