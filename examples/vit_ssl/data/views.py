"""What one image becomes in each method: views, and which of their patches are hidden."""

from __future__ import annotations

import random
from typing import Any

from PIL import Image
from torch import Tensor

from config.recipe import Recipe
from data.augment import MultiCrop
from data.masking import block_mask, kept_patches


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
    """Samples {"crops": [(3, h, w), ...]}, the global crops first, which is all that DINO needs.

    Calls take a PIL image in RGB and a `random.Random`, from which all randomness comes.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.multi_crop = multi_crop(recipe)
        vit = recipe.backbone == "vit"
        # On a side of a global crop; of a ResNet's input those parts are hidden that its features are the means over.
        self.patches = recipe.image_size // recipe.patch_size if vit else recipe.feature_grid

    def __call__(self, image: Image.Image, rng: random.Random) -> dict[str, list[Tensor]]:
        """Return the sample of `image`."""
        return {"crops": self.multi_crop(image, rng)}


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
