"""iBOT's own projection head and loss as its training script defines them (Zhou et al., ICLR 2022), for comparison."""

import warnings

import torch
from torch import Tensor, nn

from dino_original import OriginalHead, OriginalLoss


class OriginaliBOTHead(OriginalHead):
    """DINO's head with a second weight-normalised layer for the patches, which may be the first one."""

    def __init__(self, in_dim: int, out_dim: int, patch_out_dim: int, *, shared_head: bool = False, **options) -> None:
        super().__init__(in_dim, out_dim, **options)
        self.last_layer2 = self.last_layer
        if not shared_head:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                layer = nn.Linear(self.last_layer.in_features, patch_out_dim, bias=False)
                self.last_layer2 = nn.utils.weight_norm(layer)
            self.last_layer2.weight_g.data.fill_(1)
            self.last_layer2.weight_g.requires_grad = self.last_layer.weight_g.requires_grad

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = nn.functional.normalize(self.mlp(x), dim=-1, p=2)
        return self.last_layer(y[:, 0]), self.last_layer2(y[:, 1:])


class OriginaliBOTLoss(nn.Module):
    """DINO's loss of the [CLS] tokens and cross-entropy of the masked patches of each global view; two centres."""

    def __init__(self, out_dim: int, patch_out_dim: int, ngcrops: int, nlcrops: int, cls_temps, patch_temps) -> None:
        super().__init__()
        assert ngcrops == 2
        self.cls_loss = OriginalLoss(out_dim, ngcrops + nlcrops, cls_temps[0], cls_temps[-1], 0, 1)
        self.cls_loss.teacher_temps, self.patch_temps = cls_temps, patch_temps
        self.register_buffer("center2", torch.zeros(1, 1, patch_out_dim))

    def forward(self, student_output, teacher_output, student_local_cls, student_mask, epoch) -> dict[str, Tensor]:
        student_cls = torch.cat([x for x in (student_output[0], student_local_cls) if x is not None])
        cls = self.cls_loss(student_cls, teacher_output[0], epoch)
        teacher_patch = teacher_output[1].detach()
        targets = torch.softmax((teacher_patch - self.center2) / self.patch_temps[epoch], dim=-1)
        of_token = -(targets * torch.log_softmax(student_output[1] / 0.1, dim=-1)).sum(dim=-1)
        mask = torch.cat(student_mask[:2]).flatten(1)
        patch = ((of_token * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)).mean()
        self.center2 = 0.9 * self.center2 + 0.1 * teacher_patch.mean(dim=(0, 1), keepdim=True)
        return {"cls": cls, "patch": patch, "loss": cls + patch}
