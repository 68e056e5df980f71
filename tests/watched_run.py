"""What tests of watched runs share: a method whose backbone is tiny, images for it, and no validation images."""

from pathlib import Path

import numpy as np
from PIL import Image

from config.recipe import Recipe, load_recipe
from data.images import Images
from methods.method import Method
from methods.registry import build_method

SETTINGS = {
    "dataset": "folder", "batch_size": 4, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1,
    "out_dim": 8, "hidden_dim": 8, "bottleneck_dim": 4, "image_size": 16, "local_size": 8,
}  # fmt: skip


def tiny_method(method: str = "dino") -> tuple[Recipe, Method]:
    shared = {"ibot.patch_out_dim": SETTINGS["out_dim"]} if method == "ibot" else {}
    recipe = load_recipe(f"photos_{method}_vmf", SETTINGS | shared)
    built = build_method(recipe)
    built.teacher.backbone.layernorm.weight.data += 0.1  # other weights than those that a new backbone has
    return recipe, built


def pictures(count: int) -> Images:
    rng = np.random.default_rng(0)
    items = [Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(count)]
    return Images("folder", "train", ["a", "b"], np.arange(count) % 2, items)


def folder_without_val(path: Path) -> Path:
    (path / "train" / "a").mkdir(parents=True, exist_ok=True)
    return path
