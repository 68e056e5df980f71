"""DINO and DINO-vMF (Govindarajan et al., 2023): self-distillation over prototypes, with an EMA teacher."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import ViTModel

from backbone import build_backbone, cls_token
from config import Recipe
from metrics import kappa_statistics, target_statistics
from vmf_heads.compat.dino import DINOHead, DINOLoss


class Network(nn.Module):
    """A backbone and its head, fed with crops of several sizes."""

    def __init__(self, backbone: ViTModel, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, crops: list[Tensor]) -> Tensor:
        """Head outputs (len(crops) * B, K) in the order of `crops`, each (B, 3, h, w)."""
        by_size: dict[torch.Size, list[int]] = {}
        for index, crop in enumerate(crops):
            by_size.setdefault(crop.shape, []).append(index)
        # One backbone call per size, then one head call: what makes multi-crop affordable.
        tokens: dict[int, Tensor] = {}
        for indices in by_size.values():
            same_size = cls_token(self.backbone, torch.cat([crops[i] for i in indices]))
            tokens.update(zip(indices, same_size.chunk(len(indices)), strict=True))
        return self.head(torch.cat([tokens[index] for index in range(len(crops))]))


class DINO(nn.Module):
    """Student, teacher and loss of one run; equal recipes start from equal weights, drawn from `recipe.seed`.

    The cells of Table 1 are `normalization` {none, l2, vmf} x `centering` {logit, probability}.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            # The student's backbone comes first: `checkpoint.random_backbone` draws it again from the seed alone.
            self.student = Network(build_backbone(recipe, drop_path=recipe.drop_path), _build_head(recipe))
            self.teacher = Network(build_backbone(recipe), _build_head(recipe))
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        self.loss = DINOLoss(
            recipe.out_dim,
            2 + recipe.num_local_crops,
            recipe.teacher_temp_warmup,
            recipe.teacher_temp,
            recipe.teacher_temp_warmup_epochs,
            recipe.epochs,
            student_temp=recipe.student_temp,
            center_momentum=recipe.center_momentum,
            centering=recipe.centering,
        )
        self.loss.attach(self.student, self.teacher)

    def forward(self, crops: list[Tensor], epoch: int) -> tuple[Tensor, dict[str, float | Tensor]]:
        """The loss of a batch, whose first two crops are global, and statistics of its targets and prototypes.

        A call moves the centre of the teacher, so make one per training step.
        """
        teacher_output = self.teacher(crops[:2])
        student_output = self.student(crops)
        with torch.no_grad():  # before the loss, which moves the centre
            targets = self.loss.targets(teacher_output, epoch)
        loss = self.loss(student_output, teacher_output, epoch)
        statistics = {"teacher_temp": float(self.loss.teacher_temp_schedule[epoch])}
        statistics |= target_statistics(targets, loss.detach())
        statistics |= kappa_statistics(self.student.head.last_layer.norms.detach() / self.loss.student_temp)
        return loss, statistics


def _build_head(recipe: Recipe) -> nn.Module:
    head = DINOHead(
        recipe.hidden_size,
        recipe.out_dim,
        use_bn=recipe.use_bn_in_head,
        norm_last_layer=recipe.normalization == "l2",
        nlayers=recipe.head_layers,
        hidden_dim=recipe.hidden_dim,
        bottleneck_dim=recipe.bottleneck_dim,
        normalizer="vmf" if recipe.normalization == "vmf" else "none",
    )
    for layer in head.mlp.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=recipe.initializer_range)  # DINO's 0.02 vanishes in a narrow head
    return head
