"""Which shapes of a backbone a recipe may ask for."""

from __future__ import annotations

from typing import Any

from config.settings import check_fields
from config.sizes import check_sizes


def resnet_stages(patch_size: int) -> int:
    """Return the number of stages of a ResNet, whose stem has stride 4, and every stage but the first stride 2."""
    return (patch_size // 4).bit_length()


def check_backbone(recipe: Any) -> None:
    """Raise ValueError, naming the field, where a recipe asks for a shape that its kind of backbone cannot have."""
    if recipe.backbone == "vit":
        _check_vit(recipe)
    else:
        _check_resnet(recipe)


def _check_vit(recipe: Any) -> None:
    check_fields(recipe, ("feature_grid",), "1 with `backbone` (='vit')", lambda grid: grid == 1)
    check_sizes(recipe.image_size, recipe.local_size, recipe.patch_size)
    whole_heads = f"a multiple of `num_attention_heads` (={recipe.num_attention_heads})"
    check_fields(recipe, ("hidden_size",), whole_heads, lambda size: size % recipe.num_attention_heads == 0)


def _check_resnet(recipe: Any) -> None:
    of_resnet = "with `backbone` (='resnet')"
    if recipe.method != "dino":
        hiding = f"at least 2 {of_resnet} and `method` (={recipe.method!r}), which hides such parts of the images"
        check_fields(recipe, ("feature_grid",), hiding, lambda grid: grid >= 2)
    check_fields(recipe, ("patch_size",), f"4, 8, 16 or 32 {of_resnet}", lambda size: size in (4, 8, 16, 32))
    stages = resnet_stages(recipe.patch_size)
    counted = f"of the {stages} stages that `patch_size` (={recipe.patch_size}) gives"
    check_fields(recipe, ("num_hidden_layers",), f"a multiple {counted}", lambda layers: layers % stages == 0)
    doublings = 2 ** (stages - 1)
    width = f"a multiple of {doublings}, the last width over the first {counted}"
    check_fields(recipe, ("hidden_size",), width, lambda size: size % doublings == 0)
    check_fields(recipe, ("drop_path",), f"0 {of_resnet}", lambda rate: rate == 0)
