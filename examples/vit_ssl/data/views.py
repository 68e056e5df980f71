"""What one image becomes in each method: crops, and which of their patches are hidden."""

from __future__ import annotations

import random
from itertools import groupby
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate

from config.recipe import Recipe
from data.augment import MultiCrop
from data.masking import block_mask, kept_patches
from data.photometric import changed


def multi_crop(recipe: Recipe, *, num_global: int | None = None, num_local: int | None = None) -> MultiCrop:
    """Return the crops of a recipe and their augmentation; the numbers of crops are the recipe's unless given."""
    of_recipe = 2 if recipe.msn is None else 1 + recipe.msn.rand_views
    return MultiCrop(
        recipe.image_size,
        recipe.local_size,
        recipe.num_local_crops if num_local is None else num_local,
        num_global=of_recipe if num_global is None else num_global,
        global_scale=recipe.global_scale,
        local_scale=recipe.local_scale,
        color_strength=recipe.color_strength,
        saturation=recipe.saturation,
        blur_strength=recipe.blur_strength,
        blur_prob=recipe.blur_prob,
        solarize_prob=recipe.solarize_prob,
        grayscale_prob=recipe.grayscale_prob,
    )


class Views:
    """Samples {"crops": [(3, h, w), ...], "changes": [(14,), ...]}, the global crops first: all that DINO needs.

    The crops are uint8, and `finished` makes the changes of a batch of samples. Calls take a PIL image in RGB and a
    `random.Random`, from which all randomness comes.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.multi_crop = multi_crop(recipe)
        vit = recipe.backbone == "vit"
        # On a side of a global crop; of a ResNet's input those parts are hidden that its features are the means over.
        self.patches = recipe.image_size // recipe.patch_size if vit else recipe.feature_grid

    def __call__(self, image: Image.Image, rng: random.Random) -> dict[str, list[Tensor]]:
        """Return the sample of `image`."""
        crops, changes = self.multi_crop.crops(image, rng)
        return {"crops": crops, "changes": changes}


class MaskedViews(Views):
    """Samples with {"masks": [(H, W) bool for each of the two global crops]}: patches hidden from iBOT's student."""

    def __call__(self, image: Image.Image, rng: random.Random) -> dict[str, list[Tensor]]:
        """Return the sample of `image`."""
        return super().__call__(image, rng) | {"masks": [self._mask(rng) for _ in range(2)]}

    def _mask(self, rng: random.Random) -> Tensor:
        settings: Any = self.recipe.ibot
        masked = rng.random() < settings.mask_probability
        return block_mask(self.patches, self.patches, rng.uniform(*settings.mask_ratio) if masked else 0.0, rng)


class PartialViews(Views):
    """Samples with {"keep": [(n,) int64 for each of MSN's random anchors]}: the patches that the student sees of it."""

    def __call__(self, image: Image.Image, rng: random.Random) -> dict[str, list[Tensor]]:
        """Return the sample of `image`; its first crop is the target, the next ones are the random anchors."""
        settings: Any = self.recipe.msn
        sample = super().__call__(image, rng)
        keep = [kept_patches(self.patches**2, settings.patch_drop, rng) for _ in range(settings.rand_views)]
        return sample | {"keep": keep}


_VIEWS: dict[str, type[Views]] = {"dino": Views, "ibot": MaskedViews, "msn": PartialViews}


def build_views(recipe: Recipe) -> Views:
    """Return what turns an image into a sample of the recipe's method; PyTorch's collation makes batches of samples."""
    return _VIEWS[recipe.method](recipe)


def finished(batch: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    """Return a batch of samples whose crops, on any device, have their changes made: float32, normalised.

    The changes, which must be on the CPU, are then left out of it; a batch without them is returned as it is.
    """
    if "changes" not in batch:
        return batch
    crops: list[Tensor] = []
    # Crops of one size are neighbours: together they need as few calls on the device as a single one.
    for _, same in groupby(zip(batch["crops"], batch["changes"], strict=True), key=lambda pair: pair[0].shape):
        some, changes = zip(*same, strict=True)
        crops += changed(torch.cat(some), torch.cat(changes)).chunk(len(some))
    return {name: tensors for name, tensors in batch.items() if name != "changes"} | {"crops": crops}


def finished_batch(samples: list[dict[str, list[Tensor]]]) -> dict[str, list[Tensor]]:
    """Return the batch of these samples, finished; a `collate_fn` for loaders."""
    return finished(default_collate(samples))
