"""Image retrieval on revisited Oxford and Paris with frozen [CLS] features (section 5.3), as in DINO's evaluation."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from evaluators.protocol import Evaluation, Metric, NotApplicable
from evaluators.retrieval.average_precision import average_precision, positions, precision_at
from evaluators.retrieval.descriptors import describe
from evaluators.retrieval.landmarks import TREE, Landmarks, load_landmarks
from runtime.distributed import world_size

if TYPE_CHECKING:
    from evaluators.features.encoder import Encoder

# The commands that DINO published use these: (longer side in px, several scales).
PUBLISHED = {"roxford5k": (224, False), "rparis6k": (512, True)}
KS = (1, 5, 10)


@dataclass(frozen=True)
class RetrievalOptions:
    """Revisited Oxford and Paris. The paper takes the face-blurred versions (v1.0) of the images: same names."""

    datasets: tuple[Literal["roxford5k", "rparis6k"], ...] = ("roxford5k", "rparis6k")
    """The benchmarks to run, each a folder of --data."""
    image_size: int | None = None
    """Longer side in px, the aspect ratio is kept and nothing enlarged; by default 224 for Oxford, 512 for Paris."""
    multiscale: bool | None = None
    """Whether to average features over the scales 1, 0.71 and 0.5; by default for Paris alone."""
    crop_queries: bool = False
    """Crop queries to their landmark, as the benchmark wants it; DINO's evaluation, the default, takes whole images."""
    num_workers: int | None = None
    """Processes that read images, for every rank; by default the cores divided by the ranks."""

    def __post_init__(self) -> None:
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"`image_size` (={self.image_size}) must be at least 1")


def retrieval(evaluation: Evaluation, options: RetrievalOptions = RetrievalOptions()) -> Iterator[Metric]:
    """Yield the mean average precision with the medium and the hard positives, and mean precision at 1, 5 and 10.

    Nothing is tuned, so `evaluation.split` does not matter. The ranks divide the images.

    Raises:
        NotApplicable: raw pixels, or a data folder without the benchmarks.
        FileNotFoundError, OSError, ValueError: files are missing or damaged, with the layout that is expected.
    """
    if evaluation.encoder is None:
        raise NotApplicable("retrieval needs a backbone: its images differ in size, so raw pixels cannot be compared")
    if evaluation.data is None:
        raise NotApplicable(f"`data` (=None) must be a folder: {TREE.format('{roxford5k,rparis6k}')}")
    for name in options.datasets:  # before the first one is run
        if not (evaluation.data / name).is_dir():
            given = f"`data` (={str(evaluation.data)!r})"
            raise NotApplicable(f"{given} holds no folder {name}: {TREE.format(name)}; --datasets chooses which to run")
    benchmarks = {name: load_landmarks(evaluation.data, name) for name in options.datasets}
    for name, landmarks in benchmarks.items():
        yield from _benchmark(evaluation.encoder, landmarks, name, options)


def _benchmark(encoder: Encoder, landmarks: Landmarks, name: str, options: RetrievalOptions) -> Iterator[Metric]:
    size, multiscale = PUBLISHED[name]
    size = size if options.image_size is None else options.image_size
    multiscale = multiscale if options.multiscale is None else options.multiscale
    boxes = [query.box if options.crop_queries else None for query in landmarks.queries]
    workers = (os.cpu_count() or 1) // world_size() if options.num_workers is None else options.num_workers
    settings = {"multiscale": multiscale, "num_workers": workers}
    queries = describe(encoder, [query.image for query in landmarks.queries], size, boxes=boxes, **settings)
    bank = describe(encoder, landmarks.images, size, **settings)
    rankings = rank_images(queries, bank)
    for difficulty in ("medium", "hard"):
        truths = [query.truth(difficulty) for query in landmarks.queries]
        found = [positions(ranking, *truth) for ranking, truth in zip(rankings, truths, strict=True)]
        found = [places for places in found if len(places)]  # queries without positives do not count
        if not found:
            raise ValueError(f"no query of {name} has {difficulty} positives")
        notes = {"n": len(found), "split": "test", "image_size": size, "multiscale": multiscale}
        notes["crop_queries"] = options.crop_queries
        yield Metric(f"{name}_{difficulty}_mAP", _mean(map(average_precision, found)), notes)
        for k in KS:
            yield Metric(f"{name}_{difficulty}_mP@{k}", _mean(precision_at(places, k) for places in found), notes)


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def rank_images(queries: np.ndarray, bank: np.ndarray) -> np.ndarray:
    """Return the numbers (Q, N) of the images of the bank (N, D), the most similar to each query (Q, D) first; all of
    length 1.
    """
    return np.argsort(-(queries @ bank.T), axis=1, kind="stable")
