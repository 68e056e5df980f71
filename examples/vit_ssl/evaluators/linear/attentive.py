"""Attentive probing: classification by a learned query that attends to frozen patch tokens."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from data.images import load_images
from evaluators.linear.attentive_probe import HEAD_WIDTH, train_attentive_probes
from evaluators.linear.augmented_epochs import augmented_epochs
from evaluators.linear.sgd_probe import Schedule, predict, stored_epochs
from evaluators.protocol import Evaluation, Metric, NotApplicable


@dataclass(frozen=True)
class AttentiveOptions:
    """An attentive probe on the patch tokens, as CAPI's: what the patches know, where [CLS] may know less."""

    lrs: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    """Learning rates for a batch of 256, scaled by batch_size / 256; all are trained at once, with every weight decay,
    and the pair with the best accuracy on val is taken."""
    weight_decays: tuple[float, ...] = (5e-4, 5e-2)
    """Weight decays of AdamW."""
    epochs: int = 50
    """How often the train images are seen. For ImageNet CAPI's 12 500 steps are --epochs 10 --batch-size 1024."""
    batch_size: int = 128
    """Images in a batch, over all ranks."""
    attention_heads: int | None = None
    """Heads of the attention, a divisor of the width; by default one for every 64 features, or one."""
    augment: bool = False
    """Run the backbone on new random-resized and flipped crops in every epoch, as CAPI does. Without it the tokens of
    centre crops are made once and kept: 0.3 MB an image for a ViT-S/16, half of it with --extract.half."""
    seed: int = 0
    """The seed of initial weights, order and crops."""
    num_workers: int = 0
    """With augment: processes that read images, for every rank."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "attention_heads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` (={value}) must be at least 1")
        if not self.lrs or min(self.lrs) <= 0:
            raise ValueError(f"`lrs` (={self.lrs}) must be positive numbers, at least one")
        if not self.weight_decays or min(self.weight_decays) < 0:
            raise ValueError(f"`weight_decays` (={self.weight_decays}) must be at least one number, none negative")


def attentive(evaluation: Evaluation, options: AttentiveOptions = AttentiveOptions()) -> Iterator[Metric]:
    """Yield the top-1 accuracy of the attentive probe whose learning rate and weight decay are the best on val.

    Of equals the first is taken. The evaluated split is read once, after that choice.

    Raises:
        NotApplicable: there are no patch tokens, as in raw pixels and convolutional networks.
        ValueError: the heads do not divide the width.
    """
    encoder = evaluation.encoder
    if encoder is None or not encoder.has_patches:
        raise NotApplicable("an attentive probe attends to patch tokens, which this checkpoint does not give")
    default = encoder.dim // HEAD_WIDTH if encoder.dim % HEAD_WIDTH == 0 else 1
    heads = options.attention_heads or default
    if encoder.dim % heads:
        raise ValueError(f"`attention_heads` (={heads}) must divide {encoder.dim}, the width of the features")
    schedule = Schedule(options.lrs, options.epochs, options.batch_size, options.seed)
    val = evaluation.features("val", "patches")
    if options.augment:
        if evaluation.dataset is None:
            raise NotApplicable("it needs images: give --data DIR, or --dataset NAME")
        images = load_images(evaluation.dataset, "train", data=evaluation.data)
        count = len(images)
        epochs = augmented_epochs(encoder, images, np.arange(count), ["patches"], schedule, options.num_workers)
    else:
        train = evaluation.features("train", "patches")
        count = len(train.labels)
        epochs = stored_epochs({"patches": train}, np.arange(count), schedule)
    steps = math.ceil(count / options.batch_size)
    decays = options.weight_decays
    probes = train_attentive_probes(epochs, steps, encoder.dim, len(val.classes), heads, schedule, decays)
    on_val = (predict(probes, val.x, rows=options.batch_size) == val.labels).mean(axis=1)
    best = int(on_val.argmax())
    settings = list(itertools.product(options.lrs, decays))
    lr, weight_decay = settings[best]
    queries = evaluation.features(evaluation.split, "patches")
    predicted = predict(probes, queries.x, rows=options.batch_size)[best]
    sweep = {f"{lr:g}, {decay:g}": float(top1) for (lr, decay), top1 in zip(settings, on_val, strict=True)}
    notes = {"lr": lr, "weight_decay": weight_decay, "heads": heads, "n": len(queries.labels)}
    notes |= {"epochs": options.epochs, "augmented": options.augment, "val_top1_by_lr_and_weight_decay": sweep}
    yield Metric("top1", float(np.mean(predicted == queries.labels)), notes, predicted)
