"""The teacher's side of a self-distillation loss: its targets (Eq. 7) and their centre, for any loss."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ._attached import AttachedHeads, HeadPair
from ._checks import at_least, positive
from ._matmul import without_autocast
from ._state_names import RenamedState
from ._target_summary import TargetSummary, summarize_targets
from .centering import Centering, ProbabilityCentering, make_centering, teacher_targets
from .cross_entropy import prototype_cross_entropy
from .head import PrototypeHead
from .prototypes import HeadOutput, PrototypeLayer

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["TargetSummary", "TeacherSide", "TeacherTargets"]


class TeacherTargets(RenamedState):
    """What a self-distillation loss needs to become that of DINO-vMF: the teacher's targets and their centre.

    A loss of your own keeps its student's side, a log-softmax of logits over `student_temp`, and asks this module for
    the rest. Equals, for raw scores <w, y> (..., K) of the teacher's head and its temperature tau_t::

        log_c = log C_p(||w|| / tau_t)
        targets = softmax(scores / tau_t + log_c - center, dim=-1)                                  # Eq. 7
        center = m * center + (1 - m) * log(softmax(scores / tau_t + log_c, dim=-1).mean(rows))     # Eq. 9, `update_`

    `attach(student, teacher)` must be called once, after the models are built and wrapped. From then on the student's
    head returns logits with log C_p at `student_temp`, and the teacher's head its raw scores.

    Args:
        num_prototypes: K.
        student_temp: what the loss divides the student's logits by.
        center_momentum: m in [0, 1].
        centering: "probability" is Eq. 9; "logit" is DINO's Eq. 8 on logits with log C_p.
        center_on: see `ProbabilityCentering`; for centering="probability" only.
        center_start: "zeros" as in DINO, or "first_batch": the first update sets the centre instead of moving it.
        center_shape: of the buffer `center` of logit centring, with K elements; None is DINO's (1, K).
        layer: the name of the prototypes in both heads ("last_layer2" for the patches of an iBOT head).
        fused: the heads return features, for `cross_entropy`; see `prototype_cross_entropy`.
        process_group: the ranks that share one centre; None means all of them.

    State dict: `log_center` (K,) with probability centring, `center` with logit centring. The `center` of DINO, iBOT,
    DINOv2, EsViT, solo-learn or lightly loads into either.

    Raises:
        ValueError, TypeError: an argument is out of its range or a tensor has the wrong shape.
        RuntimeError: used before `attach`; or at the first use the teacher's output is not that of its head.

    Reference: Govindarajan et al., ICLR 2023, Eq. 7, 8 and 9.

    >>> import torch
    >>> from vmf_heads import TeacherTargets, VMFPrototypeHead
    >>> student, teacher = (VMFPrototypeHead(16, 32, hidden_dim=16, bottleneck_dim=8) for _ in range(2))
    >>> side = TeacherTargets(32)
    >>> side.attach(student, teacher.requires_grad_(False))
    >>> x = torch.randn(5, 16)
    >>> scores, logits = teacher(x), student(x)
    >>> targets = side.targets(scores, teacher_temp=0.04)
    >>> loss = -(targets * torch.log_softmax(logits / side.student_temp, dim=1)).sum(dim=1).mean()
    >>> side.update_(scores, teacher_temp=0.04)
    >>> list(side.state_dict())
    ['log_center']
    """

    centering: Centering
    STATE_NAMES: ClassVar[dict[str, str]] = {
        "centering.log_center": "log_center",
        "centering.logit_center": "logit_center",  # while the conversion of a loaded centre is pending
        "centering.center": "center",
    }

    def __init__(
        self,
        num_prototypes: int,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        *,
        centering: str = "probability",
        center_on: str = "responsibilities",
        center_start: str = "zeros",
        center_shape: tuple[int, ...] | None = None,
        layer: str = "last_layer",
        fused: bool = False,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.num_prototypes = at_least("num_prototypes", num_prototypes, 1)
        self.centering = make_centering(
            (1, num_prototypes) if center_shape is None else center_shape,
            center_momentum,
            centering=centering,
            center_on=center_on,
            center_start=center_start,
            process_group=process_group,
        )
        # A plain object: the heads do not become submodules, and are not saved with the loss.
        self._heads = AttachedHeads(student_temp, fused=fused, layer=layer, num_prototypes=num_prototypes)

    @property
    def student_temp(self) -> float:
        """The student's temperature."""
        return self._heads.student_temp

    @property
    def fused(self) -> bool:
        """Whether attached heads return features."""
        return self._heads.fused

    def attach(self, student: nn.Module, teacher: nn.Module, head: str | None = None) -> None:
        """Find the head in `student` and in `teacher` (through DDP, FSDP or compile) and take over their temperatures.

        From now on the student's head returns logits at `student_temp`, the teacher's raw scores. With fused=True both
        return features, or a `HeadOutput` under FSDP2 and DDP(find_unused_parameters=True). Two losses may share a head
        whose student temperature they agree on. Calling it again with the same models does nothing.

        Args:
            student: the model that is trained, with one head inside.
            teacher: its moving average, with one head inside.
            head: the name of the submodule to look in, where the models hold several heads ("dino_head" in DINOv2).

        Raises:
            ValueError: there is not exactly one head in each, they do not have K prototypes, or only the teacher's
                learns.
            RuntimeError: a head already serves another loss in another way.

        Warns if the student's norms are frozen.
        """
        self.take_heads(self.find_heads(student, teacher, head))

    def find_heads(self, student: nn.Module, teacher: nn.Module, head: str | None = None) -> HeadPair:
        """The first half of `attach`: find the heads, raise if they cannot serve, change nothing."""
        pair = self._heads.find(student, teacher, head)
        if (shards := self._heads.shards(pair)) is not None:
            shards.check_centre_of(self.centering.process_group)
        return pair

    def take_heads(self, pair: HeadPair) -> None:
        """The second half of `attach`: set the temperature, and what the heads return."""
        self._heads.take(pair)

    @property
    def heads(self) -> tuple[PrototypeHead, PrototypeHead]:
        """The attached heads of student and teacher, whose temperature is still the loss's; raises before `attach`."""
        pair = self._heads.get()
        return pair.student, pair.teacher

    @property
    def layers(self) -> tuple[PrototypeLayer, PrototypeLayer]:
        """The prototypes in the heads of student and teacher."""
        student, teacher = self.heads
        return self._heads.layer_of(student), self._heads.layer_of(teacher)

    @torch.no_grad()
    def targets(self, teacher_output: Tensor | HeadOutput, teacher_temp: float) -> Tensor:
        """The teacher's probabilities (..., K), Eq. 7, of what its head returned; the centre stays as it is."""
        self.check_outputs(teacher_output)
        return self.at(teacher_temp).targets(teacher_output)

    @torch.no_grad()
    def update_(self, teacher_output: Tensor | HeadOutput, teacher_temp: float) -> None:
        """One step of the centre from all rows of this batch, on every rank: `accumulate_`, `commit_`."""
        self.accumulate_(teacher_output, teacher_temp)
        self.commit_()

    @torch.no_grad()
    def accumulate_(self, teacher_output: Tensor | HeadOutput, teacher_temp: float) -> None:
        """Add one micro-batch to what the centre's next step averages; it moves at `commit_` only."""
        self.check_outputs(teacher_output)
        self.at(teacher_temp).accumulate_(teacher_output)

    @torch.no_grad()
    def commit_(self) -> None:
        """One step of the centre from all that was accumulated, over all ranks; each of them must call it."""
        self.centering.commit_()

    def cross_entropy(
        self,
        student_output: Tensor | HeadOutput,
        teacher_output: Tensor | HeadOutput,
        teacher_temp: float,
        *,
        teacher_rows: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """With fused=True: `prototype_cross_entropy` of these features (N, p), without the (N, K) logits.

        `teacher_rows` and `weights` say which rows meet and what each pair counts, as there. All of the teacher's rows
        join what the centre's next step averages; `commit_` makes that step.
        """
        self.check_outputs(teacher_output, student_output)
        side, (student_layer, _) = self.at(teacher_temp), self.layers
        return side.cross_entropy(
            with_prototypes(student_output, student_layer),
            with_prototypes(teacher_output, side.layer),
            self.student_temp,
            teacher_rows=teacher_rows,
            weights=weights,
        )

    def at(self, teacher_temp: float) -> TeacherSide:
        """How the teacher is read at this temperature: several questions that share one log C_p."""
        _, teacher = self.heads
        return TeacherSide(
            self.centering, positive("teacher_temp", teacher_temp), teacher, self._heads.layer_of(teacher)
        )

    def check_outputs(
        self, teacher_output: Tensor | HeadOutput, student_output: Tensor | HeadOutput | None = None
    ) -> None:
        """At the first call with rows after `attach`: raise RuntimeError unless these are what the heads returned.

        Later calls cost nothing. Every method that is given outputs calls it, `at` does not.
        """
        self._heads.check_outputs(
            features_of(teacher_output), None if student_output is None else features_of(student_output)
        )

    def __getstate__(self) -> dict[str, Any]:
        mine = self._heads
        heads = AttachedHeads(mine.student_temp, fused=mine.fused, layer=mine.layer, num_prototypes=mine.num_prototypes)
        return super().__getstate__() | {"_heads": heads}  # a copy is not attached and does not carry the models along

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        unexpected: list[str] = args[3]
        centers = [key for key in unexpected if key.rpartition(".")[2].startswith("center")]
        if centers and not any(prefix + inside in state_dict for inside in self.STATE_NAMES):
            warnings.warn(
                f"the state dict has no centre called {prefix}log_center or {prefix}center, and nothing takes its "
                f"{', '.join(map(repr, centers))}: the centre starts anew unless you rename the key",
                UserWarning,
                stacklevel=2,
            )


@dataclass(frozen=True)
class TeacherSide:
    """How what the teacher's head returned is read at one moment of training; `TeacherTargets.at` makes it.

    That is raw scores (..., K), or a `HeadOutput` whose products they are.

    Attributes:
        centering: the centre.
        temperature: the teacher's temperature.
        head: the teacher's head, which says how kappa is normalised.
        layer: the prototypes in it that this term of the loss compares with.
    """

    centering: Centering
    temperature: float
    head: PrototypeHead
    layer: PrototypeLayer

    @cached_property
    def log_normalizer(self) -> Tensor:
        """log C_p (K,) of the teacher's prototypes at this temperature, up to a constant; under FSDP2 a collective."""
        return self.head.log_normalizer(self.temperature, self.layer.gathered_norms())

    @torch.no_grad()
    def targets(self, teacher: Tensor | HeadOutput) -> Tensor:
        """The teacher's probabilities (..., K), Eq. 7; the centre stays as it is."""
        scores = teacher if isinstance(teacher, Tensor) else teacher.scores(exact=self.head.float32_scores)
        return teacher_targets(
            scores,
            self.temperature,
            log_normalizer=self.log_normalizer,
            log_center=self.centering.offset(self.temperature),
        )

    @torch.no_grad()
    def summary(self, teacher: Tensor | HeadOutput) -> TargetSummary:
        """Entropies and use of the targets; unlike `targets` it sends none where prototypes are cut over ranks."""
        return summarize_targets(
            teacher,
            self.temperature,
            self.log_normalizer,
            self.centering.offset(self.temperature),
            exact=self.head.float32_scores,
        )

    def accumulate_(self, teacher: Tensor | HeadOutput) -> None:
        """Add this to what the centre's next step averages; of a `HeadOutput` few rows have scores at a time."""
        with self._precision(features_of(teacher).device):
            self.centering.accumulate_(teacher, self.temperature, log_normalizer=self.log_normalizer)

    def cross_entropy(
        self,
        student: HeadOutput,
        teacher: HeadOutput,
        student_temperature: float,
        *,
        teacher_rows: Tensor | None,
        weights: Tensor | None,
    ) -> Tensor:
        """`prototype_cross_entropy` of all these rows, which enter the centre's next step as in `accumulate_`."""
        loss, log_sum, rows = self.cross_entropy_and_statistics(
            student, teacher, student_temperature, teacher_rows=teacher_rows, weights=weights
        )
        if isinstance(self.centering, ProbabilityCentering):  # its statistics came along with the loss
            self.centering.convert_logit_center_(self.temperature)
            self.centering.accumulate_log_sum_(log_sum, rows)
        else:
            self.accumulate_(teacher)
        return loss

    def cross_entropy_and_statistics(
        self,
        student: HeadOutput,
        teacher: HeadOutput,
        student_temperature: float,
        *,
        teacher_rows: Tensor | None,
        weights: Tensor | None,
        log_center: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, int]:
        """`prototype_cross_entropy` of all these rows; the centre stays as it is, and `log_center` may replace it."""
        with self._precision(student.features.device):
            return prototype_cross_entropy(
                student,
                teacher,
                student_temperature=student_temperature,
                teacher_temperature=self.temperature,
                normalizer=self.head.normalizer,
                log_center=self.centering.offset(self.temperature) if log_center is None else log_center,
                teacher_rows=teacher_rows,
                weights=weights,
                center_on=self.centering.center_on,
            )

    def _precision(self, device: torch.device) -> AbstractContextManager[None]:
        return without_autocast(device) if self.head.float32_scores else nullcontext()


def features_of(output: Tensor | HeadOutput) -> Tensor:
    """The tensor of rows that a head returned, whatever came along with it."""
    return output.features if isinstance(output, HeadOutput) else output


def with_prototypes(output: Tensor | HeadOutput, layer: PrototypeLayer) -> HeadOutput:
    """`output` with the prototypes it belongs to, which are read from the layer when they did not come along."""
    return output if isinstance(output, HeadOutput) else layer.with_features(output)
