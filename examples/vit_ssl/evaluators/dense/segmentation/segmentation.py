"""Semantic segmentation by frozen patch features.

Nearest neighbours are those of Balazevic et al. (2023), "Towards in-context scene understanding"; the linear head is
that of DINOv2 (Oquab et al., 2023), trained otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np

from config.settings import LOWEST_TEMPERATURE, is_temperature
from evaluators.dense.segmentation.bank import Bank, build_bank
from evaluators.dense.segmentation.folder import VOID, Pairs, load_pairs
from evaluators.dense.segmentation.measures import Agreement, agreement, confusion, upsampled_labels
from evaluators.dense.segmentation.patches import Patches, described, patches_of
from evaluators.dense.segmentation.scorers import Scorer, fit_heads, neighbour_scores
from evaluators.protocol import Evaluation, Metric
from runtime.shares import gather


@dataclass(frozen=True)
class SegmentationOptions:
    """Semantic segmentation by frozen patch features, on --data with images and masks. Images are resized to squares of
    --extract.image-size, which is 512 px in the papers."""

    methods: tuple[Literal["knn", "linear"], ...] = ("knn", "linear")
    """Nearest neighbours of patches, and logistic regression on them."""
    k: int = 30
    """For knn: neighbours of a patch."""
    temperature: float = 0.02
    """For knn: of the softmax over their cosines."""
    bank: int = 1_024_000
    """At most so many patches of train images, drawn at random, are kept, in D + K numbers each (K classes)."""
    cs: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    """For linear: strengths C, of which the one with the best mIoU on val is taken."""
    probe_patches: int = 100_000
    """For linear: at most so many patches of the bank are trained on."""
    ignore: tuple[int, ...] = ()
    """Labels of pixels that do not count, besides 255: for ADE20K --ignore 0."""
    seed: int = 0
    """Of the draws of patches."""
    num_workers: int | None = None
    """Processes that read images, for every rank; by default the cores divided by the ranks."""

    def __post_init__(self) -> None:
        lowest = {"k": 1, "bank": 1, "probe_patches": 2, "seed": 0, "num_workers": 0}
        for name, low in lowest.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"`{name}` (={value}) must be at least {low}")
        if not is_temperature(self.temperature):
            raise ValueError(f"`temperature` (={self.temperature}) must be at least {LOWEST_TEMPERATURE}")
        if not self.cs or min(self.cs) <= 0:
            raise ValueError(f"`cs` (={self.cs}) must be positive numbers, at least one")
        if not self.methods:
            raise ValueError(f"`methods` (={self.methods}) must name at least one: knn, linear")
        if not all(0 <= label <= VOID for label in self.ignore):
            raise ValueError(f"`ignore` (={self.ignore}) must be labels in 0 ... {VOID}")


def segmentation(evaluation: Evaluation, options: SegmentationOptions = SegmentationOptions()) -> Iterator[Metric]:
    """Yield mIoU and pixel accuracy of each method on the images of the evaluated split.

    Scores of patches are enlarged bilinearly to the size of the mask, and the largest one gives the label of a pixel.
    The intersections and unions of mIoU are those of all images together. The ranks divide the images.

    Raises:
        NotApplicable: no vision transformer, or a data folder without images and masks.
        FileNotFoundError: there are no images of a split, or one lacks its mask.
        ValueError: no pair can be used, or the train masks show a single class.
    """
    patches = patches_of(evaluation)
    names = ["train", *(["val"] if "linear" in options.methods else []), evaluation.split]
    files = {name: load_pairs(evaluation.data, name) for name in dict.fromkeys(names)}
    splits = {name: Pairs(pairs, name, patches.size, options.ignore) for name, pairs in files.items()}
    workers = options.num_workers
    bank = build_bank(splits["train"], patches, most=options.bank, seed=options.seed, num_workers=workers)
    settings = {"k": min(options.k, len(bank.x)), "temperature": options.temperature}
    common = {"image_size": patches.size, "classes": len(bank.classes)}
    scorers: dict[str, Scorer] = {}
    notes: dict[str, dict[str, Any]] = {}
    if "knn" in options.methods:
        scorers["knn"] = partial(neighbour_scores, bank=bank, **settings)
        notes["knn"] = {**settings, "patches": len(bank.x)}
    if "linear" in options.methods:
        sample = bank.some(options.probe_patches, options.seed)
        heads = fit_heads(sample, options.cs)
        on_val, _ = measure(splits["val"], patches, bank, {f"{c:g}": head for c, head in heads.items()}, workers)
        sweep = {c: on_val[f"{c:g}"].miou for c in sorted(heads)}
        c = max(sweep, key=sweep.__getitem__)
        scorers["linear"] = heads[c]
        notes["linear"] = {"C": c, "converged": heads[c].converged, "patches": len(sample.x)}
        notes["linear"]["val_miou_by_C"] = {f"{c:g}": miou for c, miou in sweep.items()}
    on_split, images = measure(splits[evaluation.split], patches, bank, scorers, workers)
    for name, found in on_split.items():
        about = common | notes[name] | {"n": images}
        yield Metric(f"{name}_mIoU", found.miou, about | {"iou": {str(key): iou for key, iou in found.iou.items()}})
        yield Metric(f"{name}_pixel_accuracy", found.pixel_accuracy, about)


def measure(
    pairs: Pairs, patches: Patches, bank: Bank, scorers: Mapping[str, Scorer], num_workers: int | None = None
) -> tuple[dict[str, Agreement], int]:
    """Return how well each scorer of the classes of `bank` labels the pixels of all images, and how many images those
    are, on every rank.

    Raises ValueError when no pixel counts.
    """
    counts, images = {name: np.zeros((256, 256), np.int64) for name in scorers}, 0
    for tokens, masks in described(pairs, patches, num_workers=num_workers):
        images += len(masks)
        for name, scorer in scorers.items():
            for scores, (_, mask) in zip(scorer(tokens) if masks else (), masks, strict=True):
                predicted = bank.classes[upsampled_labels(scores, mask.shape).cpu().numpy()]
                counts[name] += confusion(mask, predicted)
    totals = {name: np.sum(gather([own]), axis=0) for name, own in counts.items()}
    if not all(total.any() for total in totals.values()):
        raise ValueError(f"no pixel of the {pairs.split} masks counts: all are {VOID} or in `ignore` (={pairs.ignore})")
    return {name: agreement(total) for name, total in totals.items()}, sum(gather([images]))
