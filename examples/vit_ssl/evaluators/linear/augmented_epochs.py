"""Training data of DINO's linear protocol: features of new random crops in every epoch."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from data.augment import random_resized_crop, to_tensor
from data.augmented_images import AugmentedImages
from data.images import Images
from evaluators.features.encoder import Encoder
from evaluators.features.extraction import Readable, collate, encode
from evaluators.linear.sgd_probe import Batch, Epochs, Schedule, shuffled_batches
from runtime.distributed import rank, world_size
from runtime.interruption import leave_process_group


class FlippedCrop:
    """A random crop of 8 to 100 % of the area, at `size` px, flipped in half of the cases.

    As torchvision's RandomResizedCrop and RandomHorizontalFlip, which DINO takes, but with bicubic resampling.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: Image.Image, rng: random.Random) -> Tensor:
        """Return the view as a normalised float32 tensor (3, size, size)."""
        view = random_resized_crop(image, self.size, (0.08, 1.0), rng)
        return to_tensor(view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else view)


def augmented_epochs(
    encoder: Encoder, images: Images, rows: np.ndarray, kinds: Sequence[str], schedule: Schedule, num_workers: int = 0
) -> Epochs:
    """Return a function that makes epochs over the given rows of a split; (seed, epoch, image) alone decide a crop.

    An unreadable image adds nothing to the loss of its batch.
    """
    crops = AugmentedImages(images, FlippedCrop(encoder.image_size), schedule.seed)
    device = encoder.model.device

    @torch.no_grad()
    def epochs(epoch: int) -> Iterator[Batch]:
        crops.set_epoch(epoch)
        batches = shuffled_batches(rows, schedule, epoch)
        mine = [batch[rank() :: world_size()] for batch in batches]
        loader = DataLoader(
            Readable(crops),
            batch_sampler=[part.tolist() for part in mine],
            collate_fn=collate,
            num_workers=num_workers,
            worker_init_fn=leave_process_group,
            pin_memory=torch.cuda.is_available(),
        )
        for batch, part, (views, readable, _) in zip(batches, mine, loader, strict=True):
            labels = torch.from_numpy(images.labels[part][readable]).to(device)
            # A rank without images, as in a last batch smaller than the ranks, encodes an empty one and drops it.
            views = views if len(labels) else torch.zeros(1, 3, encoder.image_size, encoder.image_size)
            x = encode(encoder, views.to(device, non_blocking=True), kinds)
            yield {kind: features[: len(labels)] for kind, features in x.items()}, labels, len(batch)

    return epochs
