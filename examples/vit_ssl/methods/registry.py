"""The pretraining methods, one file each; `build_method` and `transform` give what a recipe names."""

from __future__ import annotations

from config.recipe import Recipe
from data.views import MaskedViews, PartialViews, Views
from methods.dino import DINO
from methods.ibot import IBOT
from methods.method import Method
from methods.msn import MSN

_METHODS: dict[str, tuple[type[Method], type[Views]]] = {
    "dino": (DINO, Views),
    "ibot": (IBOT, MaskedViews),
    "msn": (MSN, PartialViews),
}


def build_method(recipe: Recipe) -> Method:
    """Student, teacher and loss of a recipe, on the default device; `attach()` it before its first step."""
    return _METHODS[recipe.method][0](recipe)


def transform(recipe: Recipe) -> Views:
    """What makes a sample of an image, from (PIL image, random.Random); PyTorch's collation makes the batch."""
    return _METHODS[recipe.method][1](recipe)
