"""Fine-tuning of the whole backbone (A.6.5): BEiT's recipe for ImageNet, DeiT's for small data sets.

Nothing is saved on the way: a run that is stopped starts again from the beginning, and the weights are not kept.
"""

from __future__ import annotations

import copy
import math
import os
import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from data.augment import EvalTransform
from data.images import Images, load_images, share_kept
from evaluators.features.encoder import Encoder
from evaluators.features.extraction import assemble, extract, report_unreadable
from evaluators.finetune.classifier import Classifier, layer_decay_groups
from evaluators.finetune.options import FinetuneOptions, check
from evaluators.finetune.samples import FinetuneDataset, FinetuneTransform, mix, sample_batches, soft_targets
from evaluators.protocol import Evaluation, Metric, NotApplicable
from evaluators.transfer import per_class, top1
from runtime.distributed import is_main, rank, world_size
from runtime.interruption import leave_process_group
from training.ema import ema_update
from training.schedules import cosine_schedule

DEFAULTS = FinetuneOptions()


def finetune(evaluation: Evaluation, options: FinetuneOptions = DEFAULTS) -> Iterator[Metric]:
    """Yield the accuracy of the fine-tuned network after its last epoch: "top1", and "per_class", the classes' mean.

    The encoder itself stays as it is. A val split is needed only to choose among several learning rates.

    Raises:
        NotApplicable: raw pixels, a convolutional network, or no images.
        ValueError: an option is out of range.
        OSError: a train image cannot be read.
        FloatingPointError: the loss is not finite.
    """
    if evaluation.encoder is None or evaluation.dataset is None:
        raise NotApplicable("it needs a backbone and images: --data DIR, or --dataset NAME")
    if not evaluation.encoder.has_patches:
        raise NotApplicable("it is for vision transformers, not for convolutional networks")
    names = dict.fromkeys(["train", *(["val"] if len(options.lr) > 1 else []), evaluation.split])
    images = {name: load_images(evaluation.dataset, name, data=evaluation.data) for name in names}
    check(options, len(images["train"]))
    size = evaluation.encoder.image_size
    transform = EvalTransform(size, keep=share_kept(evaluation.dataset, size))
    found = {}
    for lr in options.lr:
        classifier = train(evaluation.encoder, images["train"], options, lr)
        evaluated = {name: split for name, split in images.items() if name != "train"}
        found[lr] = {name: predict(classifier, split, transform, options) for name, split in evaluated.items()}
    sweep = {lr: top1(*splits["val"]) for lr, splits in found.items() if "val" in splits}
    best = max(sweep, key=sweep.__getitem__, default=options.lr[0])
    labels, predicted = found[best][evaluation.split]
    notes = {"n": len(labels), "lr": best, "epochs": options.epochs}
    notes["val_top1_by_lr"] = {f"{lr:g}": value for lr, value in sweep.items()}
    yield Metric("top1", top1(labels, predicted), notes, predicted)
    yield Metric("per_class", per_class(labels, predicted), notes)


def train(encoder: Encoder, images: Images, options: FinetuneOptions, lr: float) -> Classifier:
    """Train a classifier on a copy of the encoder with this peak learning rate; it is returned in eval mode.

    On CUDA the network runs in bfloat16. Under torchrun the ranks share every batch.
    """
    torch.manual_seed(options.seed)
    classifier = Classifier(
        encoder,
        len(images.classes),
        mean_patch=options.pool == "mean_patch",
        drop_path=options.drop_path,
        head_scale=options.head_scale,
    ).train()
    averaged = copy.deepcopy(classifier) if options.ema else classifier
    where = classifier.head.weight.device
    groups = layer_decay_groups(classifier, weight_decay=options.weight_decay, layer_decay=options.layer_decay)
    optimizer = torch.optim.AdamW(groups)
    network: nn.Module = classifier
    if world_size() > 1:
        network = DistributedDataParallel(classifier, device_ids=[where] if where.type == "cuda" else None)
        torch.manual_seed(options.seed + rank())  # for drop path
    steps_per_epoch = len(images) // options.batch_size
    schedule = cosine_schedule(
        lr * options.batch_size / options.lr_batch,
        options.min_lr * options.batch_size / options.lr_batch,
        options.epochs * steps_per_epoch,
        warmup_steps=options.warmup_epochs * steps_per_epoch,
    )
    bar = tqdm(
        total=len(schedule),
        desc=f"fine-tuning, lr {lr:g}",
        unit="step",
        leave=False,
        mininterval=0.1 if sys.stderr.isatty() else 5,
        disable=not is_main(),
    )
    with bar:
        for step, (pixels, labels) in enumerate(_batches(images, encoder.image_size, options)):
            targets = soft_targets(labels, len(images.classes), options.smoothing)
            rng = random.Random(f"{options.seed},{step}")  # the same on every rank
            pixels, targets = mix(pixels.to(where), targets.to(where), rng, mixup=options.mixup, cutmix=options.cutmix)
            for group in optimizer.param_groups:
                group["lr"] = schedule[step] * group["lr_scale"]
            optimizer.zero_grad(set_to_none=True)
            loss = _backward(network, pixels, targets, options.micro_batch or len(pixels))
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss} at step {step + 1}: `lr` (={lr:g}) is too high")
            optimizer.step()
            if averaged is not classifier:
                ema_update(averaged, classifier, options.ema)
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()
    return averaged.eval()


def predict(
    classifier: Classifier, images: Images, transform: EvalTransform, options: FinetuneOptions
) -> tuple[np.ndarray, np.ndarray]:
    """Return (labels, predicted labels) of the images that can be read, (N,) int64 each, on every rank."""
    where = classifier.head.weight.device

    def predicted(pixels: Tensor) -> Tensor:
        with torch.autocast(where.type, torch.bfloat16, enabled=where.type == "cuda"):
            return classifier(pixels).argmax(dim=1, keepdim=True)

    chunks = extract(predicted, images, transform, device=where, batch_size=128, num_workers=_workers(options))
    found, errors = assemble(chunks, images)
    report_unreadable(images, errors)
    return found.labels, found.x[:, 0].astype(np.int64)


def _batches(images: Images, size: int, options: FinetuneOptions) -> Iterable[tuple[Tensor, Tensor]]:
    # One loader gives this rank's part of every batch of all epochs, because the epochs of small sets are short.
    transform = FinetuneTransform(size, augment=options.augment, erase=options.erase)
    batches = sample_batches(
        len(images), options.batch_size, options.epochs, seed=options.seed, repeats=options.repeats
    )
    return DataLoader(
        FinetuneDataset(images, transform, options.seed),
        batch_sampler=(batch[rank() :: world_size()] for batch in batches),
        num_workers=_workers(options),
        worker_init_fn=leave_process_group,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # or it would draw from the global one
    )


def _backward(network: nn.Module, pixels: Tensor, targets: Tensor, micro_batch: int) -> float:
    # Adds up the gradients of the mean loss of a batch, a part of it at a time, and returns that loss.
    parts = list(zip(pixels.split(micro_batch), targets.split(micro_batch), strict=True))
    total = 0.0
    for number, (part, part_targets) in enumerate(parts, start=1):
        waits = number < len(parts) and isinstance(network, DistributedDataParallel)
        with network.no_sync() if waits else nullcontext():
            with torch.autocast(part.device.type, torch.bfloat16, enabled=part.device.type == "cuda"):
                logits = network(part)
            loss = F.cross_entropy(logits.float(), part_targets) * (len(part) / len(pixels))
            loss.backward()
        total += loss.item()
    return total


def _workers(options: FinetuneOptions) -> int:
    return (os.cpu_count() or 1) // world_size() if options.num_workers is None else options.num_workers
