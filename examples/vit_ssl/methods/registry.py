"""Every pretraining method by the name that recipes give it."""

from __future__ import annotations

from config.recipe import Recipe
from methods.dino import DINO
from methods.ibot import IBOT
from methods.method import Method
from methods.msn import MSN

_METHODS: dict[str, type[Method]] = {"dino": DINO, "ibot": IBOT, "msn": MSN}


def build_method(recipe: Recipe) -> Method:
    """Return student, teacher and loss of a recipe, on the default device; `attach()` it before its first step."""
    return _METHODS[recipe.method](recipe)
