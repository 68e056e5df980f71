"""What a run leaves on disk: OUTPUT/{recipe.yaml, checkpoint.pt, metrics.jsonl, results.jsonl, backbone/}."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from transformers import ViTModel

from backbone import build_backbone
from config import Recipe, recipe_from_dict
from methods.dino import DINO
from metrics import METRICS
from vmf_heads import VMFPrototypeHead
from vmf_heads.compat.dino import DINOLoss

CHECKPOINT = "checkpoint.pt"
RUN_FILES = (CHECKPOINT, "recipe.yaml", METRICS, "results.jsonl", "backbone")
"""What makes a directory a run: pretraining refuses to start a new one where any of these exist."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A pretrained model as it is evaluated: the EMA teacher, in eval mode and without gradients."""

    recipe: Recipe
    backbone: ViTModel
    head: VMFPrototypeHead
    loss: DINOLoss  # attached, with its centre
    step: int  # training steps done
    epoch: int  # epochs done, whole ones


def save_checkpoint(directory: Path, state: dict[str, Any]) -> None:
    """Replace DIRECTORY/checkpoint.pt atomically: whenever the process dies, a whole checkpoint is there.

    `state` holds `recipe`, `method` (a state dict), `step`, `epoch` and what training needs besides.
    """
    partial = directory / f"{CHECKPOINT}.partial"
    with partial.open("wb") as file:
        torch.save({**state, "recipe": dataclasses.asdict(state["recipe"])}, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(directory / CHECKPOINT)


def load_checkpoint(directory: Path) -> dict[str, Any]:
    """The training state in DIRECTORY/checkpoint.pt, on the CPU; no code in the file is executed."""
    path = Path(directory) / CHECKPOINT
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}: expected the --output directory of a pretraining run")
    state = torch.load(path, map_location="cpu", weights_only=True)
    state["recipe"] = recipe_from_dict(state["recipe"], source=str(path))
    return state


def load_run(directory: str | Path, device: str | torch.device = "cpu") -> Run:
    """Open the last checkpoint of the run in `directory` for evaluation.

    Raises FileNotFoundError when there is none.
    """
    state = load_checkpoint(Path(directory))
    method = DINO(state["recipe"]).to(device)
    method.load_state_dict(state["method"])
    method.requires_grad_(False).eval()
    teacher = method.teacher
    return Run(state["recipe"], teacher.backbone, teacher.head, method.loss, state["step"], state["epoch"])


def random_backbone(recipe: Recipe, device: str | torch.device = "cpu") -> ViTModel:
    """The backbone of that run before its first step (same seed), in eval mode: the "random ViT" baseline."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return build_backbone(recipe).requires_grad_(False).eval().to(device)
