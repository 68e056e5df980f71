"""A whole training step with plain DINO, with DINO-vMF and with its fused loss, made of torch and this library."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import results
from benchmarks.gpu.job import Job
from benchmarks.gpu.vit import VisionTransformer
from benchmarks.step_costs import PLAIN, costs, table
from vmf_heads.compat.dino import DINOHead, DINOLoss

CONTENDERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # options of the head, and of the loss
    PLAIN: ({"normalizer": "none"}, {"centering": "logit"}),
    "DINO-vMF": ({}, {}),
    "DINO-vMF, fused loss": ({}, {"fused": True}),
}
ROUNDS = 7


@dataclass(frozen=True)
class Size:
    """A backbone, a head and a batch: 2 crops of `side` px and `local_crops` of `local_side` px of every image."""

    name: str
    dim: int
    heads: int
    images: int
    layers: int = 12
    prototypes: int = 65536
    hidden_dim: int = 2048
    side: int = 224
    local_side: int = 96
    local_crops: int = 8


SIZES = [Size("ViT-S/16", 384, 6, 64), Size("ViT-B/16", 768, 12, 64)]
TINY = Size("tiny ViT", 16, 2, 2, layers=1, prototypes=64, hidden_dim=32, side=32, local_side=16, local_crops=2)


def run(job: Job) -> list[str]:
    """Time steps at every size, under bfloat16 autocast on a GPU; errors end the stage."""
    rows: list[dict[str, Any]] = []
    for size in [TINY] if job.is_rehearsal else SIZES:
        if job.is_over():
            break
        steps = {name: TrainingStep(size, *options, job.device) for name, options in CONTENDERS.items()}
        rows += costs(dict(steps), size.name, size.images, job.device, ROUNDS)
        print(table([row for row in rows if row["size"] == size.name]), flush=True)
        results.write("training_step", job.device, rows, folder=job.results, rounds=ROUNDS)
    return []


class TrainingStep:
    """Teacher, student, loss, backward pass, AdamW and EMA on the same random crops, again and again."""

    def __init__(self, size: Size, head: dict[str, Any], loss: dict[str, Any], device: str) -> None:
        torch.manual_seed(0)
        with torch.device(device):
            self.student, self.teacher = Network(size, head), Network(size, head)
            ncrops = 2 + size.local_crops
            self.loss = DINOLoss(size.prototypes, ncrops, 0.04, 0.04, 0, 100, **loss)
            sides = [size.side] * 2 + [size.local_side] * size.local_crops
            self.crops = [torch.randn(size.images, 3, side, side) for side in sides]
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        self.loss.attach(self.student, self.teacher)
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=1e-4)
        self.device = device
        self()  # the optimiser's state belongs to the model, not to the step

    def __call__(self) -> None:
        """Do one step; no gradient is left."""
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            with torch.no_grad():
                targets = self.teacher(self.crops[:2])
            loss = self.loss(self.student(self.crops), targets, epoch=0)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(list(self.teacher.parameters()), list(self.student.parameters()), 0.004)


class Network(nn.Module):
    """Backbone and head; crops of one size go through the backbone together, as in DINO."""

    def __init__(self, size: Size, head: dict[str, Any]) -> None:
        super().__init__()
        self.backbone = VisionTransformer(size.dim, size.heads, size.layers, side=size.side)
        self.head = DINOHead(size.dim, size.prototypes, hidden_dim=size.hidden_dim, **head)

    def forward(self, crops: Sequence[Tensor]) -> Tensor:
        """The head's output for all crops, one after the other."""
        groups = [list(group) for _, group in groupby(crops, key=lambda crop: crop.shape[-1])]
        return self.head(torch.cat([self.backbone(torch.cat(group)) for group in groups]))
