"""iBOT and iBOT-vMF (appendix A.5): DINO's objective, and the same between masked patches and the teacher's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import ResNetModel

from config.methods import IBOTSettings
from config.recipe import Recipe
from methods.backbone import build_resnet, build_vit, parts, tokens
from methods.method import Batch, Method, Statistics, centered_targets, sample_rows
from methods.network import Network, initialize_mlp
from methods.statistics import center_entropy, target_statistics
from vmf_heads.compat.ibot import iBOTHead, iBOTLoss
from vmf_heads.head import find_head


class PatchNetwork(Network):
    """A ViT with a mask token and the head on its [CLS] and patch tokens; of a ResNet, on what `parts` returns."""

    def forward(self, crops: Sequence[Tensor], masks: Sequence[Tensor] = ()) -> tuple[tuple[Any, Any], Any]:
        """Return what the head makes of [CLS] (2 * B) and patches (2 * B, N) of global crops, and of the local [CLS].

        `crops` are (B, 3, h, w), the two global ones first; without local ones the last result is None. `masks`, when
        given, are the patches (B, H, W) bool that the mask token replaces in each global crop.
        """
        of_backbone: Callable[..., Tensor] = parts if isinstance(self.backbone, ResNetModel) else tokens
        mask = torch.cat(list(masks)).flatten(1) if masks else None
        cls, patches = self.head(of_backbone(self.backbone, torch.cat(list(crops[:2])), mask=mask))
        local = crops[2:]
        return (cls, patches), self.head(of_backbone(self.backbone, torch.cat(list(local)))[:, 0]) if local else None


class IBOT(Method):
    """Both objectives with one MLP; the prototypes of [CLS] and patches are the same in the paper's setting.

    Student and teacher have the same head. (In iBOT's own code the teacher's two sets of prototypes are one by default
    where the student's are two.)
    """

    loss: iBOTLoss

    def __init__(self, recipe: Recipe) -> None:
        settings = recipe.ibot
        assert settings is not None  # which the recipe has checked
        self.settings: IBOTSettings = settings
        loss = iBOTLoss(
            recipe.out_dim,
            settings.patch_out_dim,
            2,
            recipe.num_local_crops,
            recipe.teacher_temp_warmup,
            recipe.teacher_temp,
            settings.patch_teacher_temp_warmup,
            settings.patch_teacher_temp,
            recipe.teacher_temp_warmup_epochs,
            recipe.epochs,
            student_temp=recipe.student_temp,
            center_momentum=recipe.center_momentum,
            center_momentum2=settings.patch_center_momentum,
            lambda1=settings.cls_weight,
            lambda2=settings.patch_weight,
            mim_start_epoch=settings.mask_start_epoch,
            centering=recipe.centering,
            center_on=recipe.center_on,
            fused=recipe.fused_loss,
        )
        super().__init__(recipe, lambda drop_path: _build_network(recipe, settings, drop_path), loss)

    def attach(self) -> None:
        """Let the loss find the heads in student and teacher; once, after these were wrapped."""
        self.loss.attach(self.student, self.teacher)

    def forward_teacher(self, batch: Batch) -> Any:
        """Show the teacher the two global crops, the first of `batch["crops"]`, each (B, 3, h, w), with all patches."""
        output, _ = self.teacher(batch["crops"][:2])
        return output

    def forward_student(self, batch: Batch, epoch: int) -> Any:
        """Show the student all crops, the global ones without the patches that `batch["masks"]` (B, H, W) hide."""
        return self.student(batch["crops"], self._masks(batch, epoch))

    def compute_loss(
        self, student_output: Any, teacher_output: Any, batch: Batch, epoch: int, *, commit: bool = True
    ) -> tuple[Tensor, Statistics]:
        """See `Method.compute_loss`."""
        student_output, student_local = student_output
        masks = self._masks(batch, epoch)
        sample = (sample_rows(teacher_output[0]), sample_rows(teacher_output[1]))
        targets, patch_targets = self.loss.target_summary(sample, epoch)  # before the loss, which moves the centres
        losses = self.loss(student_output, teacher_output, student_local, masks, epoch, commit=commit)
        cls, patch = losses["cls"].detach(), losses["patch"].detach()
        statistics: Statistics = {
            "cls_loss": cls,
            "patch_loss": patch,
            "masked": torch.stack([mask.float().mean() for mask in masks]).mean(),
            "teacher_temp": float(self.loss.teacher_temp_schedule[epoch]),
            "patch_teacher_temp": float(self.loss.teacher_temp2_schedule[epoch]),
        }
        statistics |= target_statistics(targets, cls / self.settings.cls_weight)
        of_patches = target_statistics(patch_targets, patch)
        statistics |= {f"patch_{name}": of_patches[name] for name in ("target_entropy", "marginal_entropy")}
        koleo, of_koleo = self.koleo(*zip((self.loss.teacher, self.loss.teacher2), student_output, strict=True))
        return losses["loss"] + koleo, statistics | of_koleo | self.kappa_statistics()

    def _masks(self, batch: Batch, epoch: int) -> list[Tensor]:
        if epoch < self.settings.mask_start_epoch:
            return [torch.zeros_like(mask) for mask in batch["masks"]]
        return batch["masks"]

    def targets(self, scores: Tensor, epoch: int) -> Tensor:
        """Return the targets of Eq. 7 (N, K) for raw scores (N, K)."""
        return centered_targets(self.loss, find_head(self.teacher), scores, epoch)

    def center_statistics(self, epoch: int) -> dict[str, Tensor]:
        """Return `center_entropy` of the [CLS] centre and `center2_entropy` of that of the patches."""
        cls, patch = self.loss.teacher_temp_schedule[epoch], self.loss.teacher_temp2_schedule[epoch]
        return {
            "center_entropy": center_entropy(self.loss.centering, float(cls)),
            "center2_entropy": center_entropy(self.loss.centering2, float(patch)),
        }


def _build_network(recipe: Recipe, settings: IBOTSettings, drop_path: float) -> PatchNetwork:
    vit = recipe.backbone == "vit"
    backbone = build_vit(recipe, drop_path=drop_path, mask_token=True) if vit else build_resnet(recipe)
    head = iBOTHead(
        recipe.feature_size,
        recipe.out_dim,
        patch_out_dim=settings.patch_out_dim,
        norm="bn" if recipe.use_bn_in_head else None,
        nlayers=recipe.head_layers,
        hidden_dim=recipe.hidden_dim,
        bottleneck_dim=recipe.bottleneck_dim,
        norm_last_layer=recipe.normalization == "l2",
        shared_head=settings.shared_head,
        normalizer="vmf" if recipe.normalization == "vmf" else "none",
    )
    initialize_mlp(head, recipe.initializer_range)
    return PatchNetwork(backbone, head)
