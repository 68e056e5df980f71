"""What a run leaves for others: the backbone with its image processor, and the heads with their centre."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import BitImageProcessorPil, PreTrainedModel, ViTModel
from transformers.models.vit.modeling_vit import ViTPooler
from transformers.utils import logging as transformers_logging

from config.recipe import Recipe
from data.augment import EvalTransform
from data.images import share_kept
from data.photometric import MEAN, STD
from methods.backbone import features
from storage.checksums import write_checksums
from storage.whole_file import whole_file, whole_folder
from training.run import load_run

PROGRAM = "backbone.pt2"


def export(output: Path, push_to_hub: str | None = None, *, program: bool = False) -> None:
    """Save what others go on with: the teacher's backbone of the last checkpoint, and both heads with their centre.

    The backbone is a transformers model with an image processor beside it, so that `AutoImageProcessor` and `AutoModel`
    give the features that are evaluated here. With `program` it is also written as one of `torch.export`. On request
    it goes to the hub, with the teacher's head beside it.
    """
    transformers_logging.disable_progress_bar()
    run = load_run(output)
    backbone, heads = run.backbone, run.method.pretrained_heads()
    if program:
        write_program(backbone, run.recipe.image_size, output / PROGRAM)
    if isinstance(backbone, ViTModel):
        backbone.embeddings.mask_token = None  # iBOT's, which only pretraining needs
        return_cls(backbone)
    processor = image_processor(run.recipe)
    with whole_folder(output / "backbone") as folder:
        backbone.save_pretrained(folder)
        processor.save_pretrained(folder)
        write_checksums(folder)
    for name, head in heads.items():
        with whole_folder(output / "heads" / name) as folder:
            head.save_pretrained(folder)
            write_checksums(folder)
    written = [f"backbone/ (the teacher's, for AutoModel and AutoImageProcessor{grid_note(backbone)})"]
    written += [f"{PROGRAM} (for torch.export.load)"] * program + ["heads/"] * bool(heads)
    print(f"in {output}: {', '.join(written)}, metrics.jsonl, checkpoint.pt")
    if push_to_hub is not None:
        backbone.push_to_hub(push_to_hub)
        processor.push_to_hub(push_to_hub)
        if heads:
            dataclasses.replace(heads["teacher"], backbone=push_to_hub).push_to_hub(f"{push_to_hub}-head")


def image_processor(recipe: Recipe) -> BitImageProcessorPil:
    """Return the transformers processor that does to an RGB image what evaluation does: `EvalTransform`.

    With PIL, which transformers takes where torchvision is not installed, the pixels are the same; torchvision rounds
    some of them differently.
    """
    transform = EvalTransform(recipe.image_size, keep=share_kept(recipe.dataset, recipe.image_size))
    crop = {"height": transform.size, "width": transform.size}
    return BitImageProcessorPil(
        size={"shortest_edge": transform.resized}, crop_size=crop, image_mean=list(MEAN), image_std=list(STD)
    )


def grid_note(backbone: PreTrainedModel) -> str:
    """Return where the evaluated features of a ResNet are found, when they are not its `pooler_output`."""
    grid = getattr(backbone.config, "feature_grid", 1)
    return "" if grid == 1 else f"; features: adaptive_avg_pool2d(last_hidden_state, {grid}).flatten(1)"


def return_cls(backbone: ViTModel) -> None:
    """Give a ViT the pooler that `AutoModel` asks for, as one that does nothing: `pooler_output` is the [CLS] token."""
    backbone.config.pooler_act = "linear"
    backbone.pooler = ViTPooler(backbone.config).to(backbone.device).requires_grad_(False)
    nn.init.eye_(backbone.pooler.dense.weight)
    nn.init.zeros_(backbone.pooler.dense.bias)


def write_program(backbone: PreTrainedModel, image_size: int, path: Path) -> None:
    """Write a program of `torch.export`, which runs without this code and without transformers.

    It takes images (B, 3, image_size, image_size) for any B, normalised as in evaluation, and returns their features
    (B, D). `torch.export.load(path).module()` opens it.
    """
    images = torch.zeros(2, 3, image_size, image_size, device=backbone.device)
    batch = {0: torch.export.Dim("batch", min=1)}
    with torch.no_grad():
        program = torch.export.export(_Features(backbone), (images,), dynamic_shapes=(batch,))
    with whole_file(path) as file:
        torch.export.save(program, file)


class _Features(nn.Module):
    def __init__(self, backbone: PreTrainedModel) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        """Return the features (B, D) of images (B, 3, h, w)."""
        return features(self.backbone, images)
