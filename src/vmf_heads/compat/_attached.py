"""Base classes of the losses: they find the heads, own the temperatures, and rename the keys of the state dict.

`TeacherSide` is what they share in computing: Eq. 7, Eq. 9 and the fused cross-entropy of one term of a loss.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from .._checks import at_least, positive
from .._distributed import is_sharded
from .._matmul import without_autocast
from ..centering import Centering, ProbabilityCentering, make_centering, teacher_targets
from ..cross_entropy import prototype_cross_entropy
from ..head import PrototypeHead, find_head
from ..prototypes import HeadOutput, PrototypeLayer

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class TeacherSide:
    """How what the teacher's head returned is read at one moment of training.

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
        weights: Tensor,
    ) -> Tensor:
        """`prototype_cross_entropy` of all these rows, which enter the centre's next step as in `accumulate_`."""
        with self._precision(student.features.device):
            loss, log_sum, rows = prototype_cross_entropy(
                student,
                teacher,
                student_temperature=student_temperature,
                teacher_temperature=self.temperature,
                normalizer=self.head.normalizer,
                log_center=self.centering.offset(self.temperature),
                teacher_rows=teacher_rows,
                weights=weights,
                center_on=self.centering.center_on,
            )
        if isinstance(self.centering, ProbabilityCentering):  # its statistics came along with the loss
            self.centering.convert_logit_center_(self.temperature)
            self.centering.accumulate_log_sum_(log_sum, rows)
        else:
            self.accumulate_(teacher)
        return loss

    def _precision(self, device: torch.device) -> AbstractContextManager[None]:
        return without_autocast(device) if self.head.float32_scores else nullcontext()


def features_of(output: Tensor | HeadOutput) -> Tensor:
    """The tensor of rows that a head returned, whatever came along with it."""
    return output.features if isinstance(output, HeadOutput) else output


def check_not_empty(name: str, output: Tensor | HeadOutput) -> None:
    """Raise ValueError if `output` has no rows: the loss is a mean over images, and that of none is NaN."""
    shape = tuple(features_of(output).shape)
    if not shape or 0 in shape:
        raise ValueError(f"`{name}` (of shape {shape}) must hold at least one image: the loss is a mean over images")


def with_prototypes(output: Tensor | HeadOutput, layer: PrototypeLayer) -> HeadOutput:
    """`output` with the prototypes it belongs to, which are read from the layer when they did not come along."""
    return output if isinstance(output, HeadOutput) else layer.with_features(output)


class AttachedLoss(nn.Module):
    """A loss that works on what the heads of a student and a teacher return, and owns their temperatures.

    Args:
        student_temp: the student's temperature.
        fused: whether the heads shall return features instead of logits and scores.
        numbers: the numbers of prototypes that both heads must have, by the names of the heads' attributes.
    """

    centering: Centering
    # Where the centres' buffers stand in the loss, and their names in its state dict.
    STATE_NAMES: ClassVar[dict[str, str]] = {
        "centering.log_center": "log_center",
        "centering.logit_center": "logit_center",  # while the conversion of a loaded centre is pending
        "centering.center": "center",
    }
    HEAD: ClassVar[type[PrototypeHead]] = PrototypeHead

    def __init__(self, student_temp: float, *, fused: bool = False, **numbers: int) -> None:
        super().__init__()
        self._numbers = numbers
        self.student_temp = positive("student_temp", student_temp)
        self.fused = fused
        # In a tuple, so that the heads do not become submodules and are not saved with the loss.
        self._heads: tuple[Any, Any] | None = None
        self.register_load_state_dict_post_hook(_use_the_names_of_the_state)

    @property
    def center(self) -> Any:
        """The buffer of the original loss, with logit centring only."""
        return self.centering.center

    @property
    def log_center(self) -> Any:
        """The centre of Eq. 9 (K,), under its name in the state dict, with probability centring only."""
        return self.centering.log_center

    @property
    def logit_center(self) -> Any:
        """A DINO centre (K,) that was loaded and waits for its conversion, or None; with probability centring only."""
        return self.centering.logit_center

    def reset_parameters(self) -> None:
        """Centres of 0 and nothing accumulated, as the constructor leaves them; also after `to_empty`."""
        for centering in self.children():
            if isinstance(centering, Centering):
                centering.reset_parameters()

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
            ValueError: there is not exactly one head in each, or they are not of a kind with the loss's numbers of
                prototypes.
            RuntimeError: a head already serves another loss in another way.

        Warns if the student's norms are frozen.
        """
        student_head, teacher_head = self._find(student, "student", head), self._find(teacher, "teacher", head)
        outputs = ("logits", "scores")
        if self.fused:
            outputs = (_fused_output(student, student_head), _fused_output(teacher, teacher_head))
        self._check_heads(student_head, teacher_head, outputs)
        for found, output in zip((student_head, teacher_head), outputs, strict=True):
            found.attach_output(output)
        student_head.temperature = self.student_temp
        if student_head.normalizer == "vmf" and not student_head.last_layer.norms_require_grad:
            warnings.warn(
                "the student's prototype norms are frozen (norm_last_layer=True): no kappa can change and the vMF "
                "normalisation does nothing. Build the head with norm_last_layer=False (`--norm_last_layer false` in "
                "DINO)",
                UserWarning,
                stacklevel=2,
            )
        self._heads = (student_head, teacher_head)

    def _find(self, model: nn.Module, name: str, head: str | None) -> PrototypeHead:
        """The one head in `model`, or in its outermost submodule called `head`; errors call the model `name`."""
        where = model
        if head is not None:
            modules = dict(model.named_modules(remove_duplicate=False))  # one head may have two names
            paths = [path for path in modules if path.rpartition(".")[2] == head]
            if not paths:
                raise ValueError(
                    f"`head` (={head!r}) must be the name of a submodule of `{name}` (a {type(model).__name__})"
                )
            where = modules[min(paths, key=lambda path: path.count("."))]
        found = find_head(where, name)
        if not isinstance(found, self.HEAD):
            raise ValueError(f"the head in `{name}` (a {type(found).__name__}) must be a {self.HEAD.__name__}")
        return found

    def _check_heads(self, student: PrototypeHead, teacher: PrototypeHead, outputs: tuple[str, str]) -> None:
        """Raise unless the two heads can serve this loss; neither of them has been changed yet."""
        if student is teacher:
            raise ValueError("`student` and `teacher` must have a head each: theirs is the same object")
        for name, expected in {"normalizer": student.normalizer, **self._numbers}.items():
            for whose, found in (("student", getattr(student, name)), ("teacher", getattr(teacher, name))):
                if found != expected:
                    owner = "the student's" if name == "normalizer" else "the loss's"
                    raise ValueError(f"`{name}` of the {whose}'s head (={found!r}) must be {owner} (={expected!r})")
        if student.is_attached and student.temperature != self.student_temp:
            raise RuntimeError(
                f"`student_temp` (={self.student_temp}) must be {student.temperature}, which another loss "
                "attached to the same head uses; call `head.release()` when that loss is no longer used"
            )
        for head, output in zip((student, teacher), outputs, strict=True):
            if head.is_attached and head.output != output:
                head.attach_output(output)  # raises

    def _attached(self) -> tuple[Any, Any]:
        """The heads of student and teacher, whose temperature is still the loss's."""
        if self._heads is None:
            raise RuntimeError("call `attach(student, teacher)` once before the loss: it owns the heads' temperatures")
        found = self._heads[0].temperature
        if found != self.student_temp:
            raise RuntimeError(
                f"`temperature` of the student's head (={found}) must stay the loss's `student_temp` "
                f"(={self.student_temp}) after `attach`: the loss divides by it"
            )
        return self._heads

    def _teacher_side(self, centering: Centering, temperature: float, layer: str = "last_layer") -> TeacherSide:
        """How the teacher's output is read now, with this centre and the prototypes called `layer`."""
        head = self._attached()[1]
        return TeacherSide(centering, temperature, head, getattr(head, layer))

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_heads": None}  # a copy is not attached and does not carry the models along

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The state of the original loss, with `log_center` in place of `center` for probability centring."""
        state = super().state_dict(*args, prefix=prefix, **kwargs)
        _rename_keys(state, prefix, self.STATE_NAMES)
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        _rename_keys(state_dict, prefix, {outside: inside for inside, outside in self.STATE_NAMES.items()})
        super()._load_from_state_dict(state_dict, prefix, *args)


class SingleCenterLoss(AttachedLoss):
    """A loss with one centre that is told the teacher's temperature with every call, as in lightly and DINOv2.

    State dict: `log_center` (K,) with probability centring (Eq. 9); `center`, of the original's shape, with logit
    centring (Eq. 8). A `center` of the original loads into either.

    Args:
        out_dim: number of prototypes K.
        student_temp: the student's temperature.
        center_momentum: momentum of the centre.
        center_shape: of the original's buffer.
        centering: "probability" or "logit".
        center_on: see `ProbabilityCentering`.
        process_group: the ranks that share one centre.
    """

    def __init__(
        self,
        out_dim: int,
        student_temp: float,
        center_momentum: float,
        center_shape: tuple[int, ...],
        centering: str,
        center_on: str,
        process_group: ProcessGroup | None,
    ) -> None:
        super().__init__(student_temp, num_prototypes=at_least("out_dim", out_dim, 1))
        self.num_prototypes = out_dim
        self.center_momentum = center_momentum
        self.centering = make_centering(
            center_shape, center_momentum, centering=centering, center_on=center_on, process_group=process_group
        )

    def _targets(self, name: str, scores: Tensor, temperature: float) -> Tensor:
        """Eq. 7 (..., K) of the teacher's raw scores (..., K), which errors call `name`; the centre stays as it is."""
        self._check_columns(name, scores)
        return self._teacher_side(self.centering, temperature).targets(scores)

    def _accumulate(self, name: str, scores: Tensor, temperature: float) -> None:
        """Add these scores (..., K), which errors call `name`, to what the next step of the centre averages."""
        self._check_columns(name, scores)
        self._teacher_side(self.centering, temperature).accumulate_(scores)

    def _check_columns(self, name: str, tensor: Tensor) -> None:
        if tensor.dim() < 2 or tensor.shape[-1] != self.num_prototypes:
            raise ValueError(f"`{name}` (of shape {tuple(tensor.shape)}) must be (..., {self.num_prototypes})")


def _fused_output(model: nn.Module, head: PrototypeHead) -> str:
    """The output that a fused loss asks of `head`: plain features, or a `HeadOutput` where those would not do.

    With plain features the loss reads the prototypes from the head, outside the model's forward. FSDP2 gives such a
    read silently wrong gradients, and DistributedDataParallel(find_unused_parameters=True) counts them as unused.
    """
    finds_unused = any(getattr(module, "find_unused_parameters", False) for module in model.modules())
    sharded = any(is_sharded(parameter) for parameter in head.last_layer.parameters())
    return "prototypes" if finds_unused or sharded else "features"


def _use_the_names_of_the_state(loss: AttachedLoss, incompatible_keys: Any) -> None:
    """What load_state_dict reports as missing or unexpected has the names of the state dict."""
    for keys in incompatible_keys:
        for inside, outside in loss.STATE_NAMES.items():
            keys[:] = [key.removesuffix(inside) + outside if key.endswith(inside) else key for key in keys]


def _rename_keys(state: dict[str, Any], prefix: str, names: Mapping[str, str]) -> None:
    """Rename the keys `prefix + old` of a state dict to `prefix + new`, in place, where they exist."""
    for old, new in names.items():
        if prefix + old in state:
            state[prefix + new] = state.pop(prefix + old)
