"""A small student and teacher as DINO trains them, and the crops they see."""

import torch
from torch import Tensor, nn

from vmf_heads.compat.dino import DINOHead, DINOLoss

K, P, NCROPS, BATCH = 24, 8, 4, 5
SCHEDULE = {"warmup_teacher_temp": 0.04, "teacher_temp": 0.07, "warmup_teacher_temp_epochs": 3, "nepochs": 5}


def dino_loss(**options) -> DINOLoss:
    return DINOLoss(K, NCROPS, **{**SCHEDULE, **options})


class Model(nn.Module):
    """A linear backbone and a head."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.backbone = nn.Linear(10, 16)
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


def models(*, norms: bool = True, normalizer: str = "vmf", **options) -> tuple[Model, Model]:
    """(student, teacher) with different weights; prototype norms from 0.3 to 3 unless `norms` is False."""
    pair = []
    for lowest in (0.3, 0.5):
        head = DINOHead(16, K, hidden_dim=12, bottleneck_dim=P, normalizer=normalizer, **options)
        if norms:
            head.last_layer.weight_g.data = torch.linspace(lowest, 3, K).unsqueeze(1)
        pair.append(Model(head))
    return pair[0], pair[1].requires_grad_(False)


def crops(batch: int = BATCH) -> Tensor:
    """(NCROPS * batch, 10), crop by crop, the 2 global ones first."""
    return torch.randn(NCROPS * batch, 10)
