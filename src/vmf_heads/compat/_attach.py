"""How the losses find the heads they work with, and what they ask of them."""

from __future__ import annotations

import warnings

from torch import nn

from .._distributed import is_sharded
from ..head import VMFPrototypeHead


def find_head(model: nn.Module, name: str, kind: type[VMFPrototypeHead] = VMFPrototypeHead) -> VMFPrototypeHead:
    """The one VMFPrototypeHead inside `model`, also through DDP, FSDP and compile wrappers.

    Raises ValueError if there is none or more than one, or if it is not of this kind.
    """
    heads = {path: m for path, m in model.named_modules() if isinstance(m, VMFPrototypeHead)}
    if len(heads) != 1:
        found = "none" if not heads else f"{len(heads)}: {', '.join(repr(path) for path in heads)}"
        raise ValueError(
            f"`{name}` (a {type(model).__name__}) must contain exactly one VMFPrototypeHead; it contains {found}"
        )
    head = next(iter(heads.values()))
    if not isinstance(head, kind):
        raise ValueError(f"the head in `{name}` (a {type(head).__name__}) must be a {kind.__name__}")
    return head


def submodule(model: nn.Module, name: str, head: str | None) -> nn.Module:
    """The outermost submodule of `model` called `head`, at any depth; all of `model` for None."""
    if head is None:
        return model
    modules = dict(model.named_modules(remove_duplicate=False))  # one head may have two names
    paths = [path for path in modules if path.rpartition(".")[2] == head]
    if paths:
        return modules[min(paths, key=lambda path: path.count("."))]
    raise ValueError(f"`head` (={head!r}) must be the name of a submodule of `{name}` (a {type(model).__name__})")


def attach_heads(
    student: VMFPrototypeHead,
    teacher: VMFPrototypeHead,
    *,
    outputs: tuple[str, str],
    student_temp: float,
    **numbers: int,
) -> None:
    """Make the two heads return `outputs` and the student's use `student_temp`, after everything has been checked.

    `numbers`: those of the prototypes, by the attributes of the heads that must have these values.

    Raises ValueError unless they are two heads of a kind with so many prototypes, RuntimeError if one already serves
    another loss in another way.
    """
    if student is teacher:
        raise ValueError("`student` and `teacher` must have a head each: theirs is the same object")
    for name, expected in {"normalizer": student.normalizer, **numbers}.items():
        for whose, found in (("student", getattr(student, name)), ("teacher", getattr(teacher, name))):
            if found != expected:
                owner = "the student's" if name == "normalizer" else "the loss's"
                raise ValueError(f"`{name}` of the {whose}'s head (={found!r}) must be {owner} (={expected!r})")
    if student._attached_output is not None and student.temperature != student_temp:
        raise RuntimeError(
            f"`student_temp` (={student_temp}) must be {student.temperature}, which another loss "
            "attached to the same head uses; call `head.release()` when that loss is no longer used"
        )
    for head, output in zip((student, teacher), outputs, strict=True):
        if head._attached_output not in (None, output):
            head.attach_output(output)  # raises, before either head has been changed
    for head, output in zip((student, teacher), outputs, strict=True):
        head.attach_output(output)
    student.temperature = student_temp


def warn_if_norms_are_frozen(head: VMFPrototypeHead) -> None:
    """DINO's default `norm_last_layer=True` freezes kappa, and the vMF normalisation then does nothing."""
    if head.normalizer == "vmf" and not head.last_layer.weight_g.requires_grad:
        warnings.warn(
            "the student's prototype norms are frozen (norm_last_layer=True): no kappa can change and the vMF "
            "normalisation does nothing. Build the head with norm_last_layer=False (`--norm_last_layer false` in DINO)",
            UserWarning,
            stacklevel=3,
        )


def fused_output(student: nn.Module, head: VMFPrototypeHead) -> str:
    """The output that a fused loss asks of `head`: plain features, or a `HeadOutput` where those would not do.

    With plain features the loss reads the prototypes from the head, outside the model's forward. FSDP2 gives such a
    read silently wrong gradients, and DistributedDataParallel(find_unused_parameters=True) counts them as unused.
    """
    finds_unused = any(getattr(module, "find_unused_parameters", False) for module in student.modules())
    return "prototypes" if finds_unused or is_sharded(head.last_layer.weight_v) else "features"
