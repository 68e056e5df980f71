"""MSN (Assran et al., 2022), and MSN-vMF, with prototypes of any norm: anchors that see a part of an image."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from config.methods import MSNSettings
from config.recipe import Recipe
from methods.method import Batch, Method, Statistics
from methods.network import build_network
from methods.statistics import target_statistics
from vmf_heads import HeadOutput
from vmf_heads.centering import teacher_targets
from vmf_heads.compat.msn import init_msn_loss
from vmf_heads.head import find_head


class MSNLoss(nn.Module):
    """Cross-entropy of the anchors' predictions with the sharpened one of the target, and the regularisers.

    There is no centre, and so no buffer that a checkpoint would keep. Both sides use the student's prototypes: of norm
    1 it is MSN's own loss, else Eq. 6 with log C_p (experimental: the paper has DINO and iBOT only). The (N, K) logits
    of a small K cost little, so there is no fused path.
    """

    labels: Tensor

    def __init__(self, recipe: Recipe, settings: MSNSettings) -> None:
        super().__init__()
        self.settings, self.tau = settings, recipe.student_temp
        views = settings.rand_views + recipe.num_local_crops
        self._loss = init_msn_loss(num_views=views, tau=self.tau, return_preds=True)
        warmup, final = recipe.teacher_temp_warmup, recipe.teacher_temp
        rise = np.linspace(warmup, final, recipe.teacher_temp_warmup_epochs)
        self.teacher_temp_schedule = np.append(rise, np.full(recipe.epochs - len(rise), final))
        self.register_buffer("labels", torch.eye(recipe.out_dim), persistent=False)

    def sharpening(self, epoch: int) -> float:
        """Return T: a target is the prediction to the power 1/T, normalised."""
        return float(self.teacher_temp_schedule[epoch]) / self.tau

    def forward(self, anchors: HeadOutput, target: Tensor, epoch: int) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Return (loss, its parts, targets (B, K)) of the anchors' and the target's features.

        `anchors` holds (views * B, p), view by view, and `target` is (B, p).
        """
        cross_entropy, me_max, entropy, _, targets = self._loss(
            anchors.features,
            target,
            anchors.prototypes,
            self.labels,
            T=self.sharpening(epoch),
            use_entropy=self.settings.entropy_weight > 0,
            use_sinkhorn=self.settings.sinkhorn,
        )
        loss = cross_entropy + self.settings.me_max_weight * me_max + self.settings.entropy_weight * entropy
        parts = {"cross_entropy": cross_entropy.detach(), "me_max": me_max.detach()}
        return loss, parts, targets[: len(target)]


class MSN(Method):
    """The target is one global crop seen by the EMA encoder; anchors are the other crops, some without all patches.

    me-max and Sinkhorn-Knopp look at a whole batch over all ranks: accumulating gradients over micro-batches gives them
    smaller ones, and so another loss.
    """

    loss: MSNLoss

    def __init__(self, recipe: Recipe) -> None:
        assert recipe.msn is not None  # which the recipe has checked
        super().__init__(
            recipe,
            lambda drop_path: build_network(recipe, drop_path=drop_path, output="prototypes"),
            MSNLoss(recipe, recipe.msn),
        )

    def attach(self) -> None:
        """Do nothing: the heads return features and prototypes by themselves."""

    def forward_teacher(self, batch: Batch) -> Any:
        """Show the teacher the target, the first of `batch["crops"]`, each (B, 3, h, w)."""
        return self.teacher(batch["crops"][:1])

    def forward_student(self, batch: Batch, epoch: int) -> Any:
        """Show the student the anchors, of the random ones only the patches `batch["keep"]` (B, n) int64."""
        return self.student(batch["crops"][1:], batch["keep"])

    def compute_loss(
        self, student_output: Any, teacher_output: Any, batch: Batch, epoch: int, *, commit: bool = True
    ) -> tuple[Tensor, Statistics]:
        """See `Method.compute_loss`; `commit` has no effect, since there is no centre."""
        loss, parts, targets = self.loss(student_output, teacher_output.features, epoch)
        statistics: Statistics = {"teacher_temp": float(self.loss.teacher_temp_schedule[epoch])}
        statistics |= parts | target_statistics(targets, parts["cross_entropy"])
        return loss, statistics | self.kappa_statistics()

    def prototypes(self) -> nn.Module:
        """Return the student's prototypes, since MSN has no EMA of them."""
        return find_head(self.student).last_layer

    def targets(self, scores: Tensor, epoch: int) -> Tensor:
        """Return the sharpened predictions (N, K), which Sinkhorn-Knopp then balances over the batch in training."""
        # A prediction to the power 1/T is Eq. 6 with all of its exponent divided by T, log C_p included.
        log_normalizer = find_head(self.student).log_normalizer(self.loss.tau) / self.loss.sharpening(epoch)
        return teacher_targets(scores, float(self.loss.teacher_temp_schedule[epoch]), log_normalizer=log_normalizer)
