"""EsViT's loss on views and regions: a region of the student learns from the teacher's region most similar to it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..._checks import at_least
from ..._matmul import at_least_float32
from ...centering import Centering
from ...cross_entropy import dino_pairs
from ...teacher import TeacherSide, TeacherTargets, features_of
from .._attached import AttachedLoss, check_not_empty
from .._temperature import temperature_at, temperature_schedule
from .regions import Crops, Output, Outputs, matched_regions

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class DDINOLoss(AttachedLoss):
    """EsViT's loss on views and regions for vMF heads. Experimental.

    Equals, for student probabilities P_s and teacher probabilities P_t of views (B, K) and of regions (B, T, K), and
    features f of regions (B, T, D)::

        loss, terms = 0, 0
        for u in range(2):
            for v in range(ncrops):
                if v != u:
                    view = (-P_t[u] * log(P_s[v])).sum(dim=1)
                    nearest = (normalize(f_s[v]) @ normalize(f_t[u]).mT).argmax(dim=2)   # (B, T_s), regions of u
                    matched = stack([P_t_region[u][b, nearest[b]] for b in range(B)])
                    region = (-matched * log(P_s_region[v])).sum(dim=2).mean(dim=1)
                    loss += (0.5 * view + 0.5 * region).mean()
                    terms += 1
        loss / terms

    followed by one update of both centres with the teacher's scores of this batch. With heads of prototype norm 1 and
    centering="logit" it is EsViT's own loss.

    Args:
        out_dim: number of prototypes K of either head.
        ncrops: crops per image, the 2 global ones first.
        warmup_teacher_temp: the teacher's temperature at the start.
        teacher_temp: the teacher's temperature after its warm-up.
        warmup_teacher_temp_epochs: how many epochs the teacher's temperature rises linearly from one to the other.
        nepochs: the number of epochs of the training.
        student_temp: the student's temperature.
        center_momentum: momentum of both centres.
        centering: "probability" is Eq. 9; "logit" is DINO's Eq. 8 on logits with log C_p.
        center_on: see `ProbabilityCentering`; for centering="probability" only.
        center_start: "zeros", or "first_batch": the first update sets the centre.
        fused: compute loss and gradients from features with `prototype_cross_entropy`, without any logits.
        process_group: the ranks that share the centres; None means all of them.

    `attach(student, teacher)` must be called once, after the models are built and wrapped. State dict: `log_center`
    and `log_center_grid` (K,) with probability centring; `center` and `center_grid` (1, K), as in EsViT, with logit
    centring. The centres of an EsViT checkpoint load into either.

    Raises:
        ValueError, TypeError: an argument is out of its range or an output has the wrong shape.
        RuntimeError: called before `attach`.

    Reference: Li et al., ICLR 2022; Govindarajan et al., ICLR 2023, Eq. 6, 7, 8 and 9.

    >>> import torch
    >>> from torch import nn
    >>> from vmf_heads.compat.esvit import DDINOLoss, DINOHead
    >>> student, teacher = (
    ...     nn.ModuleDict({n: DINOHead(16, 32, hidden_dim=16, bottleneck_dim=8) for n in ("head", "head_dense")})
    ...     for _ in range(2)
    ... )
    >>> loss = DDINOLoss(32, 3, 0.04, 0.07, warmup_teacher_temp_epochs=3, nepochs=10)
    >>> loss.attach(student, teacher)
    >>> views, regions = torch.randn(3 * 5, 16), torch.randn(2 * 5 * 9 + 5 * 4, 16)  # 3 crops of 5 images
    >>> of_student = student["head"](views), student["head_dense"](regions), regions, [9, 4]
    >>> seen = views[: 2 * 5], regions[: 2 * 5 * 9]
    >>> of_teacher = teacher["head"](seen[0]), teacher["head_dense"](seen[1]), seen[1], [9]
    >>> loss(of_student, of_teacher, epoch=0).shape
    torch.Size([])
    """

    STATE_NAMES: ClassVar[dict[str, str]] = AttachedLoss.STATE_NAMES | {
        inside.replace(".", "_grid."): f"{outside}_grid" for inside, outside in AttachedLoss.STATE_NAMES.items()
    }

    def __init__(
        self,
        out_dim: int,
        ncrops: int,
        warmup_teacher_temp: float,
        teacher_temp: float,
        warmup_teacher_temp_epochs: int,
        nepochs: int,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        *,
        centering: str = "probability",
        center_on: str = "responsibilities",
        center_start: str = "zeros",
        fused: bool = False,
        process_group: ProcessGroup | None = None,
    ) -> None:
        at_least("out_dim", out_dim, 1)
        options: dict[str, Any] = {
            "centering": centering,
            "center_on": center_on,
            "center_start": center_start,
            "fused": fused,
            "process_group": process_group,
        }
        super().__init__(TeacherTargets(out_dim, student_temp, center_momentum, **options))
        self.teacher_grid = TeacherTargets(out_dim, student_temp, center_momentum, **options)
        self.num_prototypes = out_dim
        self.ncrops = at_least("ncrops", ncrops, 2)
        self.center_momentum = center_momentum
        self.teacher_temp_schedule = temperature_schedule(
            warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs, nepochs
        )

    @property
    def centering_grid(self) -> Centering:
        """The centre for regions."""
        return self.teacher_grid.centering

    @property
    def center_grid(self) -> Any:
        """The buffer of the original loss for regions, with logit centring only."""
        return self.centering_grid.center

    def attach(  # type: ignore[override]
        self, student: nn.Module, teacher: nn.Module, head: str = "head", head_dense: str = "head_dense"
    ) -> None:
        """Find both heads by their names in `student` and in `teacher`; see `TeacherTargets.attach`."""
        sides = (self.teacher, self.teacher_grid)
        # All are found and checked before any is changed.
        pairs = [side.find_heads(student, teacher, name) for side, name in zip(sides, (head, head_dense), strict=True)]
        for side, pair in zip(sides, pairs, strict=True):
            side.take_heads(pair)

    def forward(
        self,
        student_output: Outputs,
        teacher_output: Outputs,
        epoch: int,
        targets_mixup: Sequence[Tensor] | None = None,
        *,
        commit: bool = True,
    ) -> Tensor:
        """The loss of what the models with attached heads returned, then one update of both centres.

        Args:
            student_output: views (ncrops * B, K); regions (2 * B * T_g + (ncrops - 2) * B * T_l, K), crop by crop and
                image by image; their features (..., D); [T_g, T_l]. With fused=True the first two are features (., p).
            teacher_output: the same of the 2 global crops.
            epoch: of the training.
            targets_mixup: not used, as in EsViT, and with a warning: the student sees mixtures, its targets are of
                images.
            commit: False with gradients accumulated over micro-batches, on all but the last.
        """
        if targets_mixup:
            warnings.warn(
                "`targets_mixup` has no effect in DDINOLoss, in EsViT neither: the targets are those of images that "
                "the student sees mixed. Train without mixup, or with DINOLoss",
                UserWarning,
                stacklevel=2,
            )
        student, teacher = Crops(student_output, self.ncrops), Crops(teacher_output, 2)
        self._check(student, teacher)
        temperature = temperature_at(self.teacher_temp_schedule, epoch)
        self.teacher.check_outputs(teacher_output[0], student_output[0])
        self.teacher_grid.check_outputs(teacher_output[1], student_output[1])
        sides = self.teacher.at(temperature), self.teacher_grid.at(temperature)
        rows, weights = matched_regions(student, teacher)
        loss = (self._fused if self.fused else self._unfused)(student, teacher, sides, rows, weights)
        if commit:
            self.teacher.commit_()
            self.teacher_grid.commit_()
        return loss

    @torch.no_grad()
    def update_center(
        self, teacher_output: Output, teacher_grid_output: Output, epoch: int, *, commit: bool = True
    ) -> None:
        """One step of both centres from the teacher's views and regions, over all ranks; `forward` calls it.

        commit=False only adds them to those that the next step will average.
        """
        temperature = temperature_at(self.teacher_temp_schedule, epoch)
        for side, output in ((self.teacher, teacher_output), (self.teacher_grid, teacher_grid_output)):
            side.accumulate_(output, temperature)
            if commit:
                side.commit_()

    def _fused(
        self, student: Crops, teacher: Crops, sides: tuple[TeacherSide, TeacherSide], rows: Tensor, weights: Tensor
    ) -> Tensor:
        pairs, pair_weights = dino_pairs(student.images, self.ncrops, device=rows.device)
        views = self.teacher.cross_entropy(
            student.views, teacher.views, sides[0].temperature, teacher_rows=pairs, weights=pair_weights
        )
        regions = self.teacher_grid.cross_entropy(
            student.regions, teacher.regions, sides[1].temperature, teacher_rows=rows, weights=weights
        )
        return (views + regions) / 2

    def _unfused(
        self, student: Crops, teacher: Crops, sides: tuple[TeacherSide, TeacherSide], rows: Tensor, weights: Tensor
    ) -> Tensor:
        pairs, pair_weights = dino_pairs(student.images, self.ncrops, device=rows.device)
        total = features_of(student.views).new_zeros((), dtype=torch.float32)
        terms = (student.views, teacher.views, pairs, pair_weights), (student.regions, teacher.regions, rows, weights)
        for side, (of_student, of_teacher, index, weight) in zip(sides, terms, strict=True):
            log_p = (at_least_float32(features_of(of_student)) / self.student_temp).log_softmax(dim=1)
            targets = side.targets(of_teacher)
            for column in range(2):
                cross_entropy = -(targets[index[:, column].clamp(min=0)] * log_p).sum(dim=1)
                counts = weight[:, column].to(log_p.dtype) * (index[:, column] >= 0)
                total = total + (counts * cross_entropy).sum() / 2
            side.accumulate_(of_teacher)
        return total

    def _check(self, student: Crops, teacher: Crops) -> None:
        check_not_empty("teacher_output[0]", teacher.views)
        columns = self._attached()[1].bottleneck_dim if self.fused else self.num_prototypes
        for name, crops in (("student_output", student), ("teacher_output", teacher)):
            views, regions = features_of(crops.views), features_of(crops.regions)
            if views.shape != (crops.ncrops * teacher.images, columns):
                raise ValueError(
                    f"`{name}[0]` (of shape {tuple(views.shape)}) must be {(crops.ncrops * teacher.images, columns)}, "
                    f"crop by crop"
                )
            if regions.shape != (sum(crops.sizes) * teacher.images, columns) or len(crops.features) != len(regions):
                raise ValueError(
                    f"`{name}[1]` (of shape {tuple(regions.shape)}) and `{name}[2]` (of {len(crops.features)} rows) "
                    f"must have {sum(crops.sizes) * teacher.images} rows for `{name}[3]` (={list(crops.npatch)}), "
                    f"and `{name}[1]` {columns} columns"
                )
