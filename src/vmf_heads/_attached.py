"""The heads of a student and a teacher that a loss is attached to: they are found, checked and told what to return."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._checks import positive
from ._distributed import is_sharded
from ._first_outputs import FirstOutputs, check_order
from ._shards import Shards, place_of, shards_of
from .head import PrototypeHead, find_heads
from .prototypes import PrototypeLayer

FROZEN = (
    "the student's prototype norms are frozen (norm_last_layer=True): no kappa can change and the vMF normalisation "
    "does nothing. Build the head with norm_last_layer=False (`--norm_last_layer false` in DINO)"
)


class HeadPair(NamedTuple):
    """The head of a student and that of a teacher, what each shall return, and the models that they were found in."""

    student: PrototypeHead
    teacher: PrototypeHead
    outputs: tuple[str, str]
    models: tuple[nn.Module, ...]


class AttachedHeads:
    """The heads of a student and a teacher, whose temperatures the loss owns.

    Args:
        student_temp: the student's temperature.
        fused: whether the heads shall return features instead of logits and scores.
        layer: the name of the prototypes in both heads.
        num_prototypes: how many there must be; None if any number will do.
    """

    def __init__(
        self, student_temp: float, *, fused: bool, layer: str = "last_layer", num_prototypes: int | None = None
    ) -> None:
        self.student_temp = positive("student_temp", student_temp)
        self.fused, self.layer, self.num_prototypes = fused, layer, num_prototypes
        self.pair: HeadPair | None = None
        self._first: tuple[FirstOutputs, FirstOutputs] | None = None
        self._norms_learned = False

    def find(self, student: nn.Module, teacher: nn.Module, head: str | None) -> HeadPair:
        """Find the heads through DDP, FSDP or compile; raise if they cannot serve, and change nothing yet."""
        student_head, teacher_head = (_find(m, name, head) for m, name in ((student, "student"), (teacher, "teacher")))
        outputs = ("logits", "scores")
        if self.fused:
            outputs = (_fused_output(student, student_head), _fused_output(teacher, teacher_head))
        pair = HeadPair(student_head, teacher_head, outputs, (student, teacher))
        self._check(pair)
        return pair

    def take(self, pair: HeadPair) -> None:
        """Set the temperature of the student's head and what both return; warn if the student's norms are frozen."""
        of_student, of_teacher = pair.outputs
        stay = of_student == "prototypes" and _keep_prototypes(pair.models[0], pair.student)
        pair.student.attach_output(of_student, prototypes_stay=stay)
        pair.teacher.attach_output(of_teacher)
        pair.student.temperature = self.student_temp
        self._norms_learned = self.layer_of(pair.student).norms_require_grad
        if pair.student.normalizer == "vmf" and not self._norms_learned:
            warnings.warn(FROZEN, UserWarning, stacklevel=3)
        for first in self._first or ():
            first.stop()
        self.pair, self._first = pair, (FirstOutputs(pair.student, "student"), FirstOutputs(pair.teacher, "teacher"))

    def check_outputs(self, teacher: Tensor, student: Tensor | None = None) -> None:
        """At the first call with rows: raise RuntimeError unless they are what the heads returned."""
        pair = self.get()
        if self._first is None or teacher.shape[:-1].numel() == 0 or torch.compiler.is_compiling():
            return
        (of_student, of_teacher), self._first = self._first, None
        models, self.pair = pair.models, pair._replace(models=())
        try:
            whole = not self.layer_of(pair.student).cut_over_ranks
            if "features" in pair.outputs and whole and any(map(_is_sharded, models)):
                raise RuntimeError(
                    "the prototypes were whole at `attach` and are sharded now: call `attach(student, teacher)` after "
                    "fully_shard, so that a fused loss gets them through the forward of the model"
                )
            check_order(of_student, of_teacher, teacher)
            of_teacher.compare(teacher)
            if student is not None and student.shape[:-1].numel():
                of_student.compare(student)
        finally:
            of_student.stop()
            of_teacher.stop()

    def get(self) -> HeadPair:
        """The heads, which still are as `take` left them."""
        if self.pair is None:
            raise RuntimeError("call `attach(student, teacher)` once before the loss: it owns the heads' temperatures")
        head = self.pair.student
        if head.temperature != self.student_temp:
            raise RuntimeError(
                f"`temperature` of the student's head (={head.temperature}) must stay the loss's `student_temp` "
                f"(={self.student_temp}) after `attach`: the loss divides by it"
            )
        layer = self.layer_of(head)
        if self._norms_learned and not layer.norms_require_grad and any(p.requires_grad for p in layer.parameters()):
            self._norms_learned = False  # warn once
            if head.normalizer == "vmf":
                warnings.warn(FROZEN.replace(" (norm", " after `attach` (norm"), UserWarning, stacklevel=2)
        return self.pair

    def layer_of(self, head: PrototypeHead) -> PrototypeLayer:
        """The prototypes in this head."""
        found: PrototypeLayer = getattr(head, self.layer)
        return found

    def _check(self, pair: HeadPair) -> None:
        """Raise unless the two heads can serve this loss."""
        student, teacher, outputs, _ = pair
        if student is teacher:
            raise ValueError("`student` and `teacher` must have a head each: theirs is the same object")
        heads = {"student": student, "teacher": teacher}
        for whose, head in heads.items():
            if not hasattr(head, self.layer):
                raise ValueError(
                    f"the head in `{whose}` (a {type(head).__name__}) must have prototypes called {self.layer!r}"
                )
            found = self.layer_of(head).num_prototypes
            if self.num_prototypes is not None and found != self.num_prototypes:
                raise ValueError(
                    f"`{self.layer}.num_prototypes` of the {whose}'s head (={found}) must be the loss's "
                    f"(={self.num_prototypes})"
                )
        self.shards(pair)
        if teacher.normalizer != student.normalizer:
            raise ValueError(
                f"`normalizer` of the teacher's head (={teacher.normalizer!r}) must be the student's "
                f"(={student.normalizer!r})"
            )
        learns = {whose: any(p.requires_grad for p in head.parameters()) for whose, head in heads.items()}
        if learns["teacher"] and not learns["student"]:
            raise ValueError(
                "`student` (whose head has no parameter that requires gradients) and `teacher` (whose head has) must "
                "be in this order: `attach(student, teacher)`"
            )
        if student.is_attached and student.temperature != self.student_temp:
            raise RuntimeError(
                f"`student_temp` (={self.student_temp}) must be {student.temperature}, which another loss "
                "attached to the same head uses; call `head.release()` when that loss is no longer used"
            )
        for head, output in zip((student, teacher), outputs, strict=True):
            if head.is_attached and head.output != output:
                head.attach_output(output)  # raises

    def shards(self, pair: HeadPair) -> Shards | None:
        """How the prototypes are cut over ranks, None where they are not; raise unless the loss can serve them so."""
        student, teacher = self.layer_of(pair.student), self.layer_of(pair.teacher)
        if student.cut_over_ranks != teacher.cut_over_ranks:
            cut, whole = ("student", "teacher") if student.cut_over_ranks else ("teacher", "student")
            raise ValueError(
                f"the prototypes of the {whole} must be cut over the ranks as those of the {cut} are: call "
                "`shard_prototypes` for both"
            )
        if not student.cut_over_ranks:
            return None
        if not self.fused:
            raise ValueError(
                "`fused` (=False) must be True for prototypes that are cut over ranks: no rank has all logits of a row"
            )
        places = [place_of(x) for layer in (student, teacher) for x in layer.parameters()]
        if any(place != places[0] for place in places):
            raise ValueError(
                "the prototypes of student and teacher must be cut in the same way, but their parameters are placed as "
                f"{places}. If FSDP2 has cut them once more, pass `ignored_params=set(prototype_parameters(model))` to "
                "fully_shard"
            )
        shards = shards_of(next(student.parameters()), "the prototypes")
        assert shards is not None
        return shards


def _find(model: nn.Module, name: str, head: str | None) -> PrototypeHead:
    """The one head in `model`, or in its outermost submodule called `head`; errors call the model `name`."""
    where = model
    if head is not None:
        modules = dict(model.named_modules(remove_duplicate=False))  # one head may have two names
        paths = [path for path in modules if path.rpartition(".")[2] == head]
        if not paths:
            raise ValueError(
                f"`head` (={head!r}) must be the name of a submodule of `{name}` (a {type(model).__name__}), "
                f"{_choices(model)}"
            )
        where = modules[min(paths, key=lambda path: path.count("."))]
    heads = list(find_heads(where).values())
    if len(heads) == 1:
        return heads[0]
    raise ValueError(
        f"`{name}` (a {type(model).__name__}) must contain exactly one prototype head"
        f"{'' if head is None else f' in {head!r}'}; it contains {len(heads) or 'none'}"
        f"{f': pass `head=`, {_choices(where)}' if heads else ''}"
    )


def _choices(model: nn.Module) -> str:
    """The names by which `head=` finds the heads in `model`, in words."""
    names = dict.fromkeys(path.rpartition(".")[2] or path for path in find_heads(model))
    return f"one of {', '.join(map(repr, names))}" if any(names) else "and there is no prototype head in it"


def _fused_output(model: nn.Module, head: PrototypeHead) -> str:
    """The output that a fused loss asks of `head`: plain features, or a `HeadOutput` where those would not do.

    With plain features the loss reads the prototypes from the head, outside the model's forward. FSDP2 gives such a
    read silently wrong gradients, and DistributedDataParallel(find_unused_parameters=True) counts them as unused.
    """
    if head.last_layer.cut_over_ranks:  # which no wrapper knows of
        return "features"
    finds_unused = any(getattr(module, "find_unused_parameters", False) for module in model.modules())
    return "prototypes" if finds_unused or _has_shards(head) or _is_sharded(model) else "features"


def _has_shards(head: PrototypeHead) -> bool:
    """Whether FSDP2 or FSDP1 shards the head's parameters at this moment."""
    return any(is_sharded(parameter) for parameter in head.last_layer.parameters())


def _is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 shards any part of `model`, also where that part's parameters are whole at the moment."""
    return any(map(_is_fsdp_module, model.modules()))


def _is_fsdp_module(module: nn.Module) -> bool:
    return hasattr(module, "set_reshard_after_forward")


def _keep_prototypes(student: nn.Module, head: PrototypeHead) -> bool:
    """Let the prototypes stay whole from the head's forward to its backward, which soon follows; whether they will.

    FSDP2 would free them, gather them again for the backward, and leave a copy to the loss. (A teacher has no backward
    to free them after, so that its head returns a copy.)
    """
    owners = [module for module in student.modules() if _is_fsdp_module(module) and head in module.modules()]
    if not owners:
        return not _has_shards(head)  # FSDP1 frees them in any case
    innermost: Any = min(owners, key=lambda module: sum(1 for _ in module.modules()))
    innermost.set_reshard_after_forward(False, recurse=False)
    return True
