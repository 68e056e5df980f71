"""`python -m benchmarks step`: a whole training step with plain DINO, with DINO-vMF, and with its fused loss."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import results
from benchmarks.step_costs import PLAIN, costs, table
from config.recipe import Recipe, load_recipe
from methods.registry import build_method
from training.ema import ema_update
from training.optimization import parameter_groups

CONTENDERS: dict[str, dict[str, Any]] = {
    PLAIN: {"normalization": "none", "centering": "logit", "fused_loss": False},
    "DINO-vMF": {"normalization": "vmf", "centering": "probability", "fused_loss": False},
    "DINO-vMF, fused loss": {"normalization": "vmf", "centering": "probability", "fused_loss": True},
}
VIT_B = {"hidden_size": 768, "num_attention_heads": 12}
TINY = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 3, "image_size": 64, "local_size": 32}
TINY |= {"hidden_dim": 128, "out_dim": 8192}


@dataclasses.dataclass(frozen=True)
class Size:
    """A backbone and a batch."""

    name: str
    batch: int  # images
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)  # of the recipe imagenet_vits16_dino_vmf


SIZES = {
    "cpu": (Size("tiny ViT, K = 8192", 16, TINY), Size("ViT-S/16", 8)),
    "cuda": (Size("ViT-S/16", 64), Size("ViT-B/16", 64, VIT_B)),
}


def step(*, device: str = "cpu", threads: int = 2, rounds: int = 7, quick: bool = False) -> None:
    """Time whole steps on synthetic crops (2 of 224 and 8 of 96 px but for the tiny ViT), K = 65536 unless told.

    A step is teacher, student, loss, backward, AdamW and EMA; bfloat16 autocast on a GPU. Writes
    benchmarks/results/step_*.json. On a GPU also finds the largest batch that fits.

    Args:
        device: cpu or cuda; each has its own sizes.
        threads: CPU threads.
        rounds: in which the contenders take turns; medians are reported.
        quick: the first size only, printed and not written.
    """
    torch.set_num_threads(threads)
    rows: list[dict[str, Any]] = []
    for size in SIZES[device][:1] if quick else SIZES[device]:
        rows += measure(size, device, rounds)
        print(table([row for row in rows if row["size"] == size.name]), flush=True)
    if not quick:
        print(results.write("step", device, rows, rounds=rounds))


def measure(size: Size, device: str, rounds: int) -> list[dict[str, Any]]:
    """One row per contender: seconds and peak bytes, also as ratios to plain DINO."""
    steps = {name: TrainingStep(recipe(size, options), size.batch, device) for name, options in CONTENDERS.items()}
    rows = costs(dict(steps), size.name, size.batch, device, rounds)
    del steps
    if device == "cuda":
        for row in rows:
            options = CONTENDERS[row["contender"]]
            row["largest_batch"] = largest_batch(lambda batch, options=options: fits(size, options, batch))
    return rows


def recipe(size: Size, options: dict[str, Any]) -> Recipe:
    """The paper's ViT-S/16 recipe, changed as the size and the contender ask."""
    return load_recipe("imagenet_vits16_dino_vmf", size.overrides | options)


class TrainingStep:
    """One optimisation step on the same random crops, again and again."""

    def __init__(self, recipe: Recipe, batch: int, device: str) -> None:
        self.method = build_method(recipe).to(device).train()
        self.method.attach()
        self.optimizer = torch.optim.AdamW(parameter_groups(self.method.student), lr=1e-4)
        sides = [recipe.image_size] * 2 + [recipe.local_size] * recipe.num_local_crops
        self.crops: list[Tensor] = [torch.randn(batch, 3, side, side, device=device) for side in sides]
        self.device = device
        self()  # the optimiser's state belongs to the model, not to the step

    def __call__(self) -> None:
        """Teacher, student, loss, backward, AdamW, EMA."""
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            loss, _ = self.method({"crops": self.crops}, epoch=50)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        ema_update(self.method.teacher, self.method.student, 0.996)
        self.optimizer.zero_grad(set_to_none=True)


def largest_batch(fits: Callable[[int], bool]) -> int:
    """The largest number of images for which `fits` is true, to a sixteenth; 0 if there is none."""
    if not fits(1):
        return 0
    good = 1
    while fits(2 * good):
        good *= 2
    bad = 2 * good
    while bad - good > max(1, good // 16):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def fits(size: Size, options: dict[str, Any], batch: int) -> bool:
    """Whether a step with so many images ends without running out of GPU memory."""
    try:
        TrainingStep(recipe(size, options), batch, "cuda")()
    except torch.cuda.OutOfMemoryError:
        return False
    finally:
        torch.cuda.empty_cache()
    return True
