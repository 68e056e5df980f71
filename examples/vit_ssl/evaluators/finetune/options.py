"""The settings of fine-tuning: BEiT's recipe for ImageNet, DeiT's for small data sets (A.6.5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from runtime.distributed import world_size


@dataclass(frozen=True)
class FinetuneOptions:
    """BEiT's recipe, as iBOT and the paper use it for ViT-B on ImageNet.

    A ViT-S takes --epochs 200 --drop-path 0.1 --layer-decay 0.75.
    """

    lr: tuple[float, ...] = (8e-4, 9e-4, 1e-3, 2e-3)
    """Peak learning rates to try, for steps of `lr_batch` images; the one with the best top-1 on val is reported."""
    lr_batch: int = 1024
    """Learning rates, the lowest one too, are multiplied by batch_size / lr_batch."""
    min_lr: float = 1e-6
    """Learning rate at which the cosine schedule ends."""
    batch_size: int = 1024
    """Images per step, of all ranks together."""
    micro_batch: int | None = None
    """Images at a time on a rank, to save memory; by default all its images of a step."""
    epochs: int = 100
    """Passes over the train split."""
    warmup_epochs: int = 20
    """Epochs of linear warm-up from 0; part of `epochs`."""
    weight_decay: float = 0.05
    """AdamW's weight decay, for matrices alone."""
    layer_decay: float = 0.65
    """The learning rate is multiplied by this from each block to the one below; 1 changes nothing."""
    drop_path: float = 0.2
    """Stochastic depth: the rate of the last block."""
    pool: Literal["cls", "mean_patch"] = "cls"
    """What is classified: [CLS], or the mean patch token as in BEiT's own models."""
    head_scale: float = 0.001
    """The classifier's first weights, of standard deviation 0.02, are multiplied by this."""
    smoothing: float = 0.1
    """Amount of label smoothing, between 0 and 1."""
    mixup: float = 0.8
    """Parameter of Mixup's Beta distribution; 0 is none."""
    cutmix: float = 1.0
    """Parameter of CutMix's Beta distribution; 0 is none."""
    augment: bool = True
    """Whether images go through RandAugment."""
    erase: float = 0.25
    """Probability of random erasing."""
    repeats: int = 1
    """Augmentations of an image in a batch; an epoch then sees fewer images."""
    ema: float = 0.0
    """Evaluate an exponential moving average of the weights with this momentum; 0 is none."""
    seed: int = 0
    """Seed of the classifier's first weights, the order of the images and the augmentations."""
    num_workers: int | None = None
    """Processes that read images, for every rank; by default the cores divided by the ranks."""


@dataclass(frozen=True)
class SmallFinetuneOptions(FinetuneOptions):
    """DeiT's recipe, as iBOT and the paper use it for CIFAR, Flowers and Aircraft. Train on all but the test split."""

    lr: tuple[float, ...] = (7.5e-6,)
    """Peak learning rates to try, for steps of `lr_batch` images; several are compared by top-1 on val."""
    lr_batch: int = 512
    """Learning rates, the lowest one too, are multiplied by batch_size / lr_batch."""
    min_lr: float = 1e-5 * 512 / 768
    """Learning rate at which the cosine schedule ends: DeiT's 1e-5 for its batches of 768. The peak is 1.1e-5."""
    batch_size: int = 768
    """Images per step, of all ranks together."""
    epochs: int = 1000
    """Passes over the train split."""
    warmup_epochs: int = 5
    """Epochs of linear warm-up from 0; part of `epochs`."""
    layer_decay: float = 1.0
    """The learning rate is multiplied by this from each block to the one below; 1 changes nothing."""
    drop_path: float = 0.1
    """Stochastic depth: the rate of the last block."""
    head_scale: float = 1.0
    """The classifier's first weights, of standard deviation 0.02, are multiplied by this."""
    repeats: int = 3
    """Augmentations of an image in a batch; an epoch then sees fewer images."""


def check(options: FinetuneOptions, images: int) -> None:
    """Raise ValueError naming the first option that is out of range for so many train images."""
    if not options.lr or min(options.lr) <= 0:
        raise ValueError(f"`lr` (={options.lr}) must be positive numbers, at least one")
    if not world_size() <= options.batch_size <= images or options.batch_size % world_size():
        raise ValueError(
            f"`batch_size` (={options.batch_size}) must be at most the number of train images (={images}) and a "
            f"multiple of the number of ranks (={world_size()})"
        )
    if not 0 <= options.warmup_epochs < options.epochs:
        raise ValueError(f"`warmup_epochs` (={options.warmup_epochs}) must be below `epochs` (={options.epochs})")
    for name in ("lr_batch", "repeats", "layer_decay", "micro_batch"):
        if (value := getattr(options, name)) is not None and value <= 0:
            raise ValueError(f"`{name}` (={value}) must be positive")
    for name in ("drop_path", "smoothing", "erase", "ema"):
        if not 0 <= getattr(options, name) < 1:
            raise ValueError(f"`{name}` (={getattr(options, name)}) must be in [0, 1)")
