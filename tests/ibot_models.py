"""A small student and teacher as iBOT trains them, their views and masks."""

import torch
from torch import Tensor, nn

from vmf_heads.compat.ibot import iBOTHead, iBOTLoss

K, K2, P, GLOBAL, LOCAL, BATCH = 24, 20, 8, 2, 2, 5
CLS_TEMPS, PATCH_TEMPS = [0.04, 0.05, 0.05], [0.04, 0.07, 0.07]
HEADS = {"default": (False, True), "both shared": (True, True), "none shared": (False, False)}


def num_patch_prototypes(heads: str) -> int:
    return K if any(HEADS[heads]) else K2


def ibot_loss(heads: str = "default", **options) -> iBOTLoss:
    temps = (CLS_TEMPS[0], CLS_TEMPS[-1], PATCH_TEMPS[0], PATCH_TEMPS[-1])
    return iBOTLoss(K, num_patch_prototypes(heads), GLOBAL, LOCAL, *temps, 1, 3, **options)


class Model(nn.Module):
    """A linear backbone on every token and a head."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.backbone = nn.Linear(10, 16)
        self.head = head

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(self.backbone(x))


def models(heads: str = "default", *, norms: bool = True, **options) -> tuple[Model, Model]:
    """(student, teacher) with different weights; prototype norms from 0.3 to 3 unless `norms` is False."""
    pair = []
    for lowest, shared in zip((0.3, 0.5), HEADS[heads], strict=True):
        dims = {"patch_out_dim": num_patch_prototypes(heads), "hidden_dim": 12, "bottleneck_dim": P}
        head = iBOTHead(16, K, shared_head=shared, **dims, **options)
        if norms:
            for layer in (head.last_layer, head.last_layer2):
                layer.weight_g.data = torch.linspace(lowest, 3, len(layer.weight_g)).unsqueeze(1)
        pair.append(Model(head))
    return pair[0], pair[1].requires_grad_(False)


def views(batch: int = BATCH) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Tokens of the global views (2 * batch, 1 + 6, 10), of the local ones (2 * batch, 1 + 2, 10), masks (2 x 3)."""
    masks = [torch.rand(batch, 2, 3) < 0.4 for _ in range(GLOBAL)] + [torch.rand(batch, 1, 2) < 0.4] * LOCAL
    masks[0][:2] = False  # an image without a masked patch, and one with a single one
    masks[0][1, 0, 0] = True
    return torch.randn(GLOBAL * batch, 7, 10), torch.randn(LOCAL * batch, 3, 10), masks
