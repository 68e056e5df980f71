"""Linear classification on frozen features: Table 2 of the paper, and logistic regression for small data sets."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from data.images import load_images
from evaluators.features.encoder import Encoder
from evaluators.linear.augmented_epochs import augmented_epochs
from evaluators.linear.logistic_probe import CS, logistic_probe
from evaluators.linear.sgd_probe import Schedule, predict, stored_epochs, train_probes
from evaluators.protocol import Evaluation, Features, Metric, NotApplicable

# This is iBOT's grid: 1e-4, 2e-4 ... 9e-4, 1e-3, 2e-3 ... 9.
LRS = tuple(round(digit * 10.0**power, -power) for power in range(-4, 1) for digit in range(1, 10))
LOGISTIC_LIMIT = 50_000


@dataclass(frozen=True)
class LinearOptions:
    """Linear classification: by SGD as in Table 2 ([C] and [D]), or by logistic regression for small data sets."""

    classifier: Literal["auto", "logistic", "sgd"] = "auto"
    """logistic takes scikit-learn's regression on [CLS] features, with C chosen on val; sgd takes DINO's protocol; auto
    takes logistic for fewer than 50 000 train images."""
    cs: tuple[float, ...] = CS
    """For logistic: scikit-learn's inverse strengths of regularisation, of which the best on val is taken."""
    augment: bool = False
    """For sgd: run the backbone on new random-resized and flipped crops in every epoch, as DINO and the paper do.
    Without it the features are those of centre crops, made once, which is cheaper."""
    tokens: Literal["auto", "last4", "cls+mean_patch"] = "auto"
    """For sgd: what [D] is; auto takes, as DINO, last4 up to ViT-S and cls+mean_patch for wider ones. [C] is [CLS]. A
    convolutional network has [C] alone, its pooled output."""
    lrs: tuple[float, ...] = LRS
    """For sgd: the learning rates for a batch of 256, scaled by batch_size / 256; the default is iBOT's sweep."""
    epochs: int = 100
    """For sgd: how often the train images are seen."""
    batch_size: int = 1024
    """For sgd: images in a batch, over all ranks."""
    holdout: float = 0.0
    """For sgd: share of the train images on which the learning rate is chosen and that are not trained on. With 0 it is
    chosen on val, as in the paper, so that the accuracy on val is a little optimistic."""
    seed: int = 0
    """For sgd: the seed of initial weights, order, crops and holdout."""
    num_workers: int = 0
    """For sgd with augment: processes that read images, for every rank."""


def linear(evaluation: Evaluation, options: LinearOptions = LinearOptions()) -> Iterator[Metric]:
    """Yield the top-1 accuracies: "top1" of logistic regression, or "top1_C" and "top1_D" of Table 2.

    Raises:
        ValueError: an option is out of range.
        NotApplicable: crops of raw pixels are asked for.
    """
    _check(options)
    classifier = options.classifier
    if classifier == "auto":
        large = options.augment or len(evaluation.features("train").labels) >= LOGISTIC_LIMIT
        classifier = "sgd" if large else "logistic"
    if classifier == "sgd":
        yield from sgd(evaluation, options)
    else:
        splits = ("train", "val", evaluation.split)
        yield logistic_probe(*map(evaluation.features, splits), cs=options.cs)


def sgd(evaluation: Evaluation, options: LinearOptions) -> Iterator[Metric]:
    """Yield the accuracies by DINO's protocol, with the best learning rate on held-out train images or on val."""
    encoder = evaluation.encoder
    kinds = {"top1_C": "cls"}
    if encoder is not None and encoder.has_patches:
        kinds["top1_D"] = _tokens(options, encoder)
    schedule = Schedule(options.lrs, options.epochs, options.batch_size, options.seed)
    val = {kind: evaluation.features("val", kind) for kind in kinds.values()}
    if options.augment:
        if encoder is None or evaluation.dataset is None:
            raise NotApplicable("`augment` (=True) needs a backbone and images, not raw pixels")
        images = load_images(evaluation.dataset, "train", data=evaluation.data)
        held_out, rest = _hold_out(len(images), options)
        # The rows of images are those of features only where every image has some.
        if len(held_out) and (unreadable := len(images) - len(evaluation.features("train").labels)):
            given = f"`holdout` (={options.holdout}) with `augment`"
            raise ValueError(f"{given} needs all train images, but {unreadable} could not be read")
        epochs = augmented_epochs(encoder, images, rest, list(val), schedule, options.num_workers)
    else:
        train = {kind: evaluation.features("train", kind) for kind in val}
        held_out, rest = _hold_out(len(train["cls"].labels), options)
        epochs = stored_epochs(train, rest, schedule)
    dims = {kind: found.x.shape[1] for kind, found in val.items()}
    probes = train_probes(epochs, dims, len(val["cls"].classes), schedule)
    for name, kind in kinds.items():
        if len(held_out):
            bank = evaluation.features("train", kind)
            chosen_on = Features(bank.x[held_out], bank.labels[held_out], bank.classes)
        else:
            chosen_on = val[kind]
        correct = predict(probes[kind], chosen_on.x) == chosen_on.labels
        sweep = dict(zip(options.lrs, correct.mean(axis=1).tolist(), strict=True))
        lr = max(sweep, key=sweep.__getitem__)
        queries = evaluation.features(evaluation.split, kind)
        predicted = predict(probes[kind], queries.x)[options.lrs.index(lr)]
        notes = {"lr": lr, "tokens": kind, "epochs": options.epochs, "augmented": options.augment}
        notes["chosen_on"] = "held-out train images" if len(held_out) else "val"
        notes["top1_by_lr"] = {f"{lr:g}": top1 for lr, top1 in sweep.items()}
        yield Metric(name, float(np.mean(predicted == queries.labels)), notes, predicted)


def _tokens(options: LinearOptions, encoder: Encoder) -> str:
    if options.tokens != "auto":
        return options.tokens
    return "last4" if encoder.dim <= 384 else "cls+mean_patch"


def _hold_out(count: int, options: LinearOptions) -> tuple[np.ndarray, np.ndarray]:
    order = np.random.default_rng(options.seed).permutation(count)
    held_out = math.ceil(options.holdout * count)
    return np.sort(order[:held_out]), np.sort(order[held_out:])


def _check(options: LinearOptions) -> None:
    for name in ("epochs", "batch_size"):
        if getattr(options, name) < 1:
            raise ValueError(f"`{name}` (={getattr(options, name)}) must be at least 1")
    for name in ("lrs", "cs"):
        if not getattr(options, name) or min(getattr(options, name)) <= 0:
            raise ValueError(f"`{name}` (={getattr(options, name)}) must be positive numbers, at least one")
    if not 0 <= options.holdout < 1:
        raise ValueError(f"`holdout` (={options.holdout}) must be in [0, 1)")
