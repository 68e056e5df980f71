"""[CLS] features of images of any size, as DINO's image retrieval takes them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data.augment import to_tensor
from data.files import open_image
from runtime.distributed import is_main
from runtime.interruption import leave_process_group
from runtime.shares import gather, share

if TYPE_CHECKING:
    from evaluators.features.encoder import Encoder

SMALLER_SCALES = (2**-0.5, 0.5)

Box = tuple[float, float, float, float]


@torch.inference_mode()
def describe(
    encoder: Encoder,
    files: list[Path],
    size: int,
    *,
    boxes: list[Box | None] | None = None,
    multiscale: bool = False,
    num_workers: int = 0,
) -> np.ndarray:
    """Return the features (N, D) of length 1 of the images in `files`, each cropped to its box in px, where it has one.

    The ranks divide the images; every one gets all features.
    """
    todo = share(list(zip(files, boxes or [None] * len(files), strict=True)))
    loader = DataLoader(
        _Images(todo, size),
        batch_size=None,  # sizes differ: one at a time
        num_workers=num_workers,
        worker_init_fn=leave_process_group,
    )
    mininterval = 0.1 if sys.stderr.isatty() else 5
    bar = tqdm(loader, desc="features", unit="image", leave=False, mininterval=mininterval, disable=not is_main())
    return np.stack(gather([describe_image(encoder, image, multiscale).cpu().numpy() for image in bar]))


class _Images(Dataset):
    def __init__(self, items: list[tuple[Path, Box | None]], size: int) -> None:
        self.items, self.size = items, size

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Tensor:
        path, box = self.items[index]
        image = open_image(path).convert("RGB")
        if box:
            image = image.crop(box)
        image.thumbnail((self.size, self.size), Image.Resampling.LANCZOS)
        return to_tensor(image)


def describe_image(encoder: Encoder, image: Tensor, multiscale: bool) -> Tensor:
    """Return the [CLS] feature (D,) of one image (3, H, W), of length 1; with several scales that of the mean over
    them.
    """
    image = image[None].to(encoder.model.device)
    features = encoder.cls(whole_patches(image, encoder.patch_size))
    for scale in SMALLER_SCALES if multiscale else ():
        smaller = F.interpolate(image, scale_factor=scale, mode="bilinear", align_corners=False)
        features = features + encoder.cls(whole_patches(smaller, encoder.patch_size))
    return F.normalize(features[0], dim=0)


def whole_patches(images: Tensor, patch_size: int) -> Tensor:
    """Return the images (B, 3, H, W) without what lies right of and below the last whole patch, which DINO's network
    ignores too.

    Raises ValueError when there is no whole patch.
    """
    height, width = (side // patch_size * patch_size for side in images.shape[-2:])
    if not height or not width:
        raise ValueError(f"an image of {images.shape[-2]} x {images.shape[-1]} px has no patch of {patch_size} px")
    return images[..., :height, :width]
