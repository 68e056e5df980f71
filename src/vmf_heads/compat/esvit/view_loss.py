"""EsViT's loss on views: DINO's, also for students that see mixtures of images (mixup, CutMix)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._matmul import at_least_float32, without_autocast
from ...prototypes import HeadOutput
from ...teacher import features_of, with_prototypes
from ..dino import DINOLoss as _DINOLoss


class DINOLoss(_DINOLoss):
    """EsViT's loss on views for vMF heads: `compat.dino.DINOLoss`, and `targets_mixup`. Experimental.

    Equals with mixtures, where row i and column j of the matrix `targets_mixup[v]` say what the teacher's row i counts
    for the student's row j of crop v (timm's Mixup in batch mode, where the share of image i in row j is that of image
    j in row i)::

        pairs = [(u, v) for u in range(2) for v in range(ncrops) if u != v]
        sum(-(targets_mixup[v] * (P_t[u] @ log(P_s[v]).T)).sum(dim=1).mean() for u, v in pairs) / len(pairs)

    With heads of prototype norm 1 and centering="logit" it is EsViT's own loss. Arguments, `attach`, state and errors
    are those of `vmf_heads.compat.dino.DINOLoss`.

    Reference: Li et al., ICLR 2022; Govindarajan et al., ICLR 2023, Eq. 6, 7, 8 and 9.

    >>> import torch
    >>> from vmf_heads.compat.esvit import DINOHead, DINOLoss
    >>> student, teacher = (DINOHead(16, 32, hidden_dim=16, bottleneck_dim=8) for _ in range(2))
    >>> loss = DINOLoss(32, 4, 0.04, 0.07, warmup_teacher_temp_epochs=3, nepochs=10)
    >>> loss.attach(student, teacher)
    >>> crops = torch.randn(4 * 5, 16)
    >>> mixup = [0.7 * torch.eye(5) + 0.3 * torch.eye(5).flip(0)] * 4
    >>> loss(student(crops), teacher(crops[: 2 * 5]), epoch=0, targets_mixup=mixup).shape
    torch.Size([])
    """

    def forward(
        self,
        student_output: Tensor | HeadOutput,
        teacher_output: Tensor | HeadOutput,
        epoch: int,
        targets_mixup: Sequence[Tensor] | None = None,
        *,
        commit: bool = True,
    ) -> Tensor:
        """The loss of what the attached heads returned: (ncrops * B, K) and (2 * B, K), crop by crop.

        Then the centre is updated, unless `commit` is False. `targets_mixup`: for each crop a matrix (B, B), or None
        where nothing is mixed. With fused=True both outputs are features (..., p).
        """
        if not targets_mixup:
            return super().forward(student_output, teacher_output, epoch, commit=commit)
        images = self._check_rows(student_output, teacher_output)
        if [tuple(matrix.shape) for matrix in targets_mixup] != [(images, images)] * self.ncrops:
            raise ValueError(
                f"`targets_mixup` (of shapes {[tuple(matrix.shape) for matrix in targets_mixup]}) must hold a matrix "
                f"(B, B) for each of the `ncrops` (={self.ncrops}) crops, with B={images}"
            )
        teacher, side = self._read(teacher_output, epoch)
        self.teacher.check_outputs(teacher_output, student_output)
        # (V, B, 2, B): crop and image of the student, crop and image of the teacher; a view meets no other of its own.
        mixture = torch.stack(list(targets_mixup)).transpose(1, 2).unsqueeze(2).repeat(1, 1, 2, 1)
        mixture = mixture / (images * (2 * self.ncrops - 2))
        for view in range(2):
            mixture[view, :, view] = 0
        weights = mixture.reshape(self.ncrops * images, 2 * images)
        if isinstance(teacher, HeadOutput):
            student = with_prototypes(student_output, self._attached()[0].last_layer)
            rows = torch.arange(2 * images, device=weights.device).expand(weights.shape)
            loss = side.cross_entropy(student, teacher, self.student_temp, teacher_rows=rows, weights=weights)
        else:
            logits = at_least_float32(features_of(student_output)) / self.student_temp
            with without_autocast(logits.device):
                cross_entropy = -logits.log_softmax(dim=1) @ side.targets(teacher).T
            loss = (weights * cross_entropy).sum()
            side.accumulate_(teacher)
        if commit:
            self.teacher.commit_()
        return loss
