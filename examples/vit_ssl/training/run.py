"""What a run leaves on disk: OUTPUT/{recipe.yaml, checkpoint.pt, metrics.jsonl, results.jsonl, backbone/, heads/}."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from config.recipe import Recipe
from methods.backbone import build_backbone
from methods.method import Method
from methods.registry import build_method
from storage.torch_file import UnreadableFile
from training.checkpoint_file import CHECKPOINT, PREVIOUS, load_checkpoint, save_checkpoint
from training.log import METRICS

__all__ = [
    "CHECKPOINT",
    "PREVIOUS",
    "RUN_FILES",
    "Run",
    "load_checkpoint",
    "load_run",
    "random_backbone",
    "save_checkpoint",
]

RUN_FILES = (CHECKPOINT, PREVIOUS, "recipe.yaml", METRICS, "results.jsonl", "backbone", "heads")
"""These files make a directory a run; pretraining refuses to start a new run where any of them exists."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A pretrained model as it is evaluated: in eval mode and without gradients."""

    recipe: Recipe
    method: Method  # attached
    step: int  # training steps done
    epoch: int  # epochs done, whole ones

    @property
    def backbone(self) -> PreTrainedModel:
        """The backbone of the EMA teacher."""
        return self.method.teacher.backbone

    @property
    def head(self) -> nn.Module:
        """The head of the EMA teacher, which returns what `loss` takes."""
        return self.method.teacher.head

    @property
    def loss(self) -> nn.Module:
        """The method's loss, with its centre."""
        return self.method.loss


def load_run(directory: str | Path, device: str | torch.device = "cpu") -> Run:
    """Open the last checkpoint of the run in `directory` for evaluation, however many processes wrote it.

    Raises FileNotFoundError when there is none, UnreadableFile when it is damaged or not of a run.
    """
    state: dict[str, Any] = load_checkpoint(Path(directory))
    # Not fused: heads return scores and the loss takes them, as an evaluation wants to see them.
    method = build_method(dataclasses.replace(state["recipe"], fused_loss=False)).to(device)
    try:
        method.load_state_dict(state["method"])
    except (KeyError, RuntimeError) as error:
        path = Path(directory) / CHECKPOINT
        raise UnreadableFile(f"the weights in {path} are not those of its recipe: {str(error).strip()}") from error
    method.attach()
    method.requires_grad_(False).eval()
    return Run(state["recipe"], method, state["step"], state["epoch"])


def random_backbone(recipe: Recipe, device: str | torch.device = "cpu") -> PreTrainedModel:
    """Return the backbone of that run before its first step (same seed), in eval mode: the baseline "random"."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return build_backbone(recipe).requires_grad_(False).eval().to(device)
