"""Images as grids of patches: their features, and the labels of the pixels in each."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from evaluators.dense.segmentation.folder import VOID, Pairs
from evaluators.features.extraction import Readable, report_unreadable
from evaluators.protocol import Evaluation, NotApplicable
from runtime.distributed import device, is_main, world_size
from runtime.interruption import leave_process_group
from runtime.shares import gather, share

if TYPE_CHECKING:
    from evaluators.features.encoder import Encoder

BATCH = 16
"""Images at a time."""


@dataclass(frozen=True)
class Patches:
    """What patches are described by: images (B, 3, size, size) -> (B, size / patch_size, size / patch_size, D)."""

    encoder: Encoder | None
    """The tokens are those of its last block; None: a patch is described by its pixels, D = 3 patch_size^2."""
    patch_size: int
    size: int

    def __call__(self, images: Tensor) -> Tensor:
        """Return the features of the patches, in float32."""
        if self.encoder is not None:
            return self.encoder.patches(images.to(self.encoder.model.device)).float()
        p = self.patch_size
        cut = images.to(device()).unfold(2, p, p).unfold(3, p, p)  # (B, 3, rows, columns, p, p)
        return cut.permute(0, 2, 3, 1, 4, 5).flatten(3)


def patches_of(evaluation: Evaluation) -> Patches:
    """Return the patches of what is evaluated; raw pixels are cut as the checkpoint's network cuts images.

    Raises NotApplicable when that is no vision transformer.
    """
    network = evaluation.encoder or evaluation.network
    if network is None or not network.has_patches:
        raise NotApplicable("segmentation needs the patch tokens of a vision transformer")
    return Patches(evaluation.encoder, network.patch_size, network.image_size)


@torch.inference_mode()
def described(
    pairs: Pairs, patches: Patches, *, num_workers: int | None = None
) -> Iterator[tuple[Tensor, list[tuple[int, np.ndarray]]]]:
    """Yield this rank's batches: the features (n, h, w, D) of the pairs that can be used, and the number and the mask
    of each of these.

    The ranks divide the batches as `share` does; all of them must ask for all of theirs. Raises ValueError in the end
    when no pair can be used.
    """
    batches = [range(first, min(first + BATCH, len(pairs))) for first in range(0, len(pairs), BATCH)]
    mine = share(batches)
    loader = DataLoader(
        Readable(pairs),
        batch_sampler=mine,
        collate_fn=list,
        num_workers=(os.cpu_count() or 1) // world_size() if num_workers is None else num_workers,
        worker_init_fn=leave_process_group,
    )
    shown = {"leave": False, "disable": not is_main(), "mininterval": 0.1 if sys.stderr.isatty() else 5}
    errors: list[str] = []
    for numbers, items in zip(mine, tqdm(loader, f"patches of {pairs.split}", unit="batch", **shown), strict=True):
        errors += [item for item in items if isinstance(item, str)]
        usable = [(number, item) for number, item in zip(numbers, items, strict=True) if not isinstance(item, str)]
        tokens = patches(torch.stack([image for _, (image, _) in usable])) if usable else torch.empty(0)
        yield tokens, [(number, mask.numpy()) for number, (_, mask) in usable]
    report_unreadable(pairs, [error for part in gather([errors]) for error in part])


def label_shares(mask: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Return the share of each label among the labelled pixels of every patch: uint8 (H, W) -> float32 (rows * columns,
    255).

    A pixel belongs to the patch that its upper left corner lies in. The shares of a patch without labelled pixels are
    0.
    """
    height, width = mask.shape
    patch = (np.arange(height) * rows // height)[:, None] * columns + np.arange(width) * columns // width
    counts = np.bincount((256 * patch + mask).ravel(), minlength=256 * rows * columns).reshape(-1, 256)[:, :VOID]
    return (counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)).astype(np.float32)
