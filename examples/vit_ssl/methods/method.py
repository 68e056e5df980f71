"""What every pretraining method is to the training loop and to the evaluation."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from config.recipe import Recipe
from methods.online_mixture import OnlineMixture
from methods.statistics import kappa_statistics
from vmf_heads import HeadOutput, TeacherTargets
from vmf_heads.centering import teacher_targets
from vmf_heads.head import PrototypeHead, find_head
from vmf_heads.hub import PretrainedHead
from vmf_heads.regularizers import prototype_koleo

Batch = Mapping[str, list[Tensor]]
"""The collated views that the method's part of `data.views` makes."""
Statistics = dict[str, float | Tensor]

STATISTICS_ROWS = 256
"""The statistics of a step look at the targets of so many teacher rows, so that they need no (N, K) of all rows."""


class Method(nn.Module, ABC):
    """Student, teacher and loss of one run; equal recipes start from equal weights, drawn from `recipe.seed`.

    `build(drop_path)` makes one network: the student with the recipe's drop path, then the teacher without. What DDP,
    FSDP2 and compile wrap is `student` and `teacher`: replace the attributes, or change them in place, then `attach`.
    The buffers of `loss` are its centres. `mixture` is None where the loss' gradient trains the prototypes.
    """

    student: nn.Module
    teacher: nn.Module
    loss: nn.Module
    mixture: OnlineMixture | None

    def __init__(self, recipe: Recipe, build: Callable[[float], nn.Module], loss: nn.Module) -> None:
        super().__init__()
        self.recipe = recipe
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.student, self.teacher = build(recipe.drop_path), build(0.0)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        self.loss = loss
        self.mixture = None if recipe.online_em is None else OnlineMixture(recipe.online_em, recipe)

    @abstractmethod
    def attach(self) -> None:
        """Let the loss find the heads in student and teacher; once, after these were wrapped."""

    @abstractmethod
    def forward_teacher(self, batch: Batch) -> Any:
        """Return what the teacher's head makes of the crops that the targets come from; call it without gradients."""

    @abstractmethod
    def forward_student(self, batch: Batch, epoch: int) -> Any:
        """Return what the student's head makes of its crops."""

    @abstractmethod
    def compute_loss(
        self, student_output: Any, teacher_output: Any, batch: Batch, epoch: int, *, commit: bool = True
    ) -> tuple[Tensor, Statistics]:
        """Return the loss of a micro-batch (a mean over its images), and statistics of its targets and prototypes.

        Then the centre moves, if there is one. commit=False on all but the last micro-batch of a step lets it move once
        per step, by all of them.
        """

    def forward(self, batch: Batch, epoch: int, *, commit: bool = True) -> tuple[Tensor, Statistics]:
        """Call teacher, student and loss one after the other, which `pretrain.train_step` spells out."""
        with torch.no_grad():
            teacher_output = self.forward_teacher(batch)
        return self.compute_loss(self.forward_student(batch, epoch), teacher_output, batch, epoch, commit=commit)

    def pretrained_heads(self) -> dict[str, PretrainedHead]:
        """Return the heads of student and teacher, of iBOT's the part for [CLS], with the centre and the last
        temperature of the teacher. MSN has neither: it has none to return.
        """
        targets = getattr(self.loss, "teacher", None)
        if not isinstance(targets, TeacherTargets):
            return {}
        temperature = self.recipe.teacher_temp
        averaged = "logits" if self.recipe.centering == "logit" else self.recipe.center_on
        return {
            name: PretrainedHead(find_head(network), temperature, targets.centering.offset(temperature), averaged)
            for name, network in (("student", self.student), ("teacher", self.teacher))
        }

    def prototypes(self) -> nn.Module:
        """Return the prototypes that the targets come from."""
        return find_head(self.teacher).last_layer

    @torch.no_grad()
    def scores(self, features: Tensor) -> Tensor:
        """Return the teacher's raw scores <w_k, y> (N, K) of backbone features (N, D), whatever output the loss
        attached.
        """
        return self.prototypes()(find_head(self.teacher).features(features), exact=True)

    @abstractmethod
    def targets(self, scores: Tensor, epoch: int) -> Tensor:
        """Return the targets (N, K) the teacher would set for [CLS] tokens of these raw scores (N, K) at this epoch."""

    def koleo(self, *heads: tuple[TeacherTargets, Any]) -> tuple[Tensor | float, Statistics]:
        """Return the weighted term that keeps the student's prototypes apart, and its statistics, or nothing of both.

        `heads` are the loss' sides and what the student returned for them. A `HeadOutput` among these has prototypes
        that left the model through its forward: under FSDP2 those read from outside would have wrong gradients.
        """
        if self.recipe.prototype_koleo_weight == 0:
            return 0.0, {}
        directions = {}  # by layer: two sides may share one
        for side, output in heads:
            layer = side.layers[0]
            whole = output if isinstance(output, HeadOutput) else layer.with_features(output)
            directions[id(layer)] = whole.directions
        koleo = torch.stack([prototype_koleo(found) for found in directions.values()]).sum()
        return self.recipe.prototype_koleo_weight * koleo, {"koleo": koleo.detach()}

    def follow_features(self) -> Statistics:
        """Let prototypes that are a mixture follow the teacher's features of a step, at its end; return statistics."""
        if self.mixture is None:
            return {}
        statistics: Statistics = {**self.mixture.update_()}
        self.mixture.write_(self.student, self.teacher)
        return statistics

    def kappa_statistics(self) -> dict[str, Tensor]:
        """Return the quantiles of kappa = ||w|| / student_temp over the student's prototypes."""
        return kappa_statistics(find_head(self.student).last_layer.gathered_norms() / self.recipe.student_temp)

    def center_statistics(self, epoch: int) -> dict[str, Tensor]:
        """Return the entropy in nats of each centre as it is after the step; a method without a centre has none."""
        return {}


def sample_rows(output: Tensor | HeadOutput, rows: int = STATISTICS_ROWS) -> Any:
    """Return at most `rows` rows, evenly spaced, of what an attached head returned; all of them where there are no
    more.
    """
    features = (output.features if isinstance(output, HeadOutput) else output).flatten(0, -2)
    sample = features[:: math.ceil(len(features) / rows)]
    return output._replace(features=sample) if isinstance(output, HeadOutput) else sample


def centered_targets(loss: Any, head: PrototypeHead, scores: Tensor, epoch: int) -> Tensor:
    """Return the targets of Eq. 7 (N, K) for raw scores (N, K), by the schedule and [CLS] centre of this loss."""
    temperature = float(loss.teacher_temp_schedule[epoch])
    return teacher_targets(
        scores,
        temperature,
        log_normalizer=head.log_normalizer(temperature),
        log_center=loss.centering.offset(temperature),
    )
