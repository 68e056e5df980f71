"""Linear classifiers trained by SGD on frozen features, one for each learning rate, as DINO and iBOT do."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from evaluators.protocol import Features
from runtime.distributed import device, is_main, rank, world_size
from runtime.shares import gather, share

Batch = tuple[Mapping[str, Tensor], Tensor, int]
"""This rank's part of a batch: features (b, D) of every kind, labels (b,), and the size of the batch over all ranks."""

Epochs = Callable[[int], Iterable[Batch]]
"""The batches of an epoch, given its number."""


@dataclass(frozen=True)
class Schedule:
    """DINO's protocol: SGD with momentum 0.9 and without weight decay, the learning rates on a cosine to 0."""

    lrs: tuple[float, ...]  # for a batch of 256; those used are lr * batch_size / 256
    epochs: int
    batch_size: int  # over all ranks
    seed: int = 0


class LinearProbes(nn.Module):
    """A linear classifier for each learning rate; they share nothing but their inputs."""

    def __init__(self, dim: int, classes: int, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(dim, classes) for _ in range(count)])
        for layer in self.layers:
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (count, B, classes) of features (B, D)."""
        return torch.stack([layer(x) for layer in self.layers])


def train_probes(epochs: Epochs, dims: Mapping[str, int], classes: int, schedule: Schedule) -> dict[str, LinearProbes]:
    """Train a stack of classifiers on every kind of features, (kind, D) in `dims`, in one pass over the batches.

    Ranks with equal `epochs` but for their parts of the batches get what one process gets, up to rounding.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(schedule.seed)
        stacks = {kind: LinearProbes(dim, classes, len(schedule.lrs)) for kind, dim in dims.items()}
    stacks = {kind: stack.to(device()) for kind, stack in stacks.items()}
    groups = [
        {"params": layer.parameters(), "lr": lr * schedule.batch_size / 256}
        for stack in stacks.values()
        for layer, lr in zip(stack.layers, schedule.lrs, strict=True)
    ]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, schedule.epochs)
    minimise(stacks, optimizer, epochs, schedule.epochs, what="linear probes", after_epoch=cosine.step)
    return stacks


def minimise(
    stacks: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    epochs: Epochs,
    count: int,
    *,
    what: str,
    after_step: Callable[[], None] = lambda: None,
    after_epoch: Callable[[], None] = lambda: None,
) -> None:
    """Train classifiers for `count` epochs: those of a stack take the features of its kind and share nothing else.

    A stack returns the logits (classifiers, B, classes). `what` names them in the progress bar; the last two change
    learning rates.
    """
    trained = {kind: DistributedDataParallel(stack) if world_size() > 1 else stack for kind, stack in stacks.items()}
    shown = {"leave": False, "disable": not is_main(), "mininterval": 0.1 if sys.stderr.isatty() else 5}
    for epoch in tqdm(range(count), desc=what, unit="epoch", **shown):
        for features, labels, total in epochs(epoch):
            optimizer.zero_grad()
            for kind, module in trained.items():
                logits = module(features[kind])
                # Every classifier minimises its own mean over the whole batch; DDP takes the mean over ranks.
                targets = labels.expand(len(logits), -1).flatten()
                loss = F.cross_entropy(logits.flatten(0, 1), targets, reduction="sum")
                (loss * (world_size() / total)).backward()
            optimizer.step()
            after_step()
        after_epoch()


@torch.inference_mode()
def predict(probes: nn.Module, x: np.ndarray, *, rows: int = 1024) -> np.ndarray:
    """Return the labels (count, N) that each classifier gives features (N, D); the ranks divide them."""
    parts = share([slice(first, first + rows) for first in range(0, len(x), rows)])
    return np.concatenate(gather([probes(to_device(x[part])).argmax(dim=2).cpu().numpy() for part in parts]), axis=1)


def stored_epochs(features: Mapping[str, Features], rows: np.ndarray, schedule: Schedule) -> Epochs:
    """Return a function that makes epochs over the given rows of stored features, one entry for each kind."""

    def epochs(epoch: int) -> Iterator[Batch]:
        for batch in shuffled_batches(rows, schedule, epoch):
            mine = np.sort(batch[rank() :: world_size()])  # memory-mapped features are read in their order
            x = {kind: to_device(found.x[mine]) for kind, found in features.items()}
            labels = next(iter(features.values())).labels[mine]
            yield x, torch.from_numpy(labels).to(device()), len(batch)

    return epochs


def shuffled_batches(rows: np.ndarray, schedule: Schedule, epoch: int) -> list[np.ndarray]:
    """Return all `rows` in batches, in an order drawn from (seed, epoch)."""
    order = np.random.default_rng([schedule.seed, epoch]).permutation(rows)
    return [order[first : first + schedule.batch_size] for first in range(0, len(order), schedule.batch_size)]


def to_device(x: np.ndarray) -> Tensor:
    """Return the features as float32 on this rank's device."""
    return torch.from_numpy(np.array(x)).to(device()).float()
