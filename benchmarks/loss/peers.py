"""Other libraries' losses, where they are installed, or in a folder of checkouts that VMF_HEADS_UPSTREAM names."""

import contextlib
import importlib
import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from benchmarks.loss.inputs import STUDENT_TEMPERATURE, TEACHER_TEMPERATURE, Inputs, Size
from vmf_heads.cross_entropy import dino_pairs

Contender = Callable[[Inputs], Tensor]


def available(size: Size) -> tuple[dict[str, Contender], dict[str, str]]:
    """(losses by name, why the others are missing by name); none of them has patches at the same position."""
    found: dict[str, Contender] = {}
    missing: dict[str, str] = {}
    for name, make in {"lightly": _lightly, "DINOv2": _dinov2, "Liger, KL pair by pair": _liger}.items():
        if not size.ncrops:
            missing[name] = "does not have this loss"
            continue
        try:
            found[name] = make(size)
        except Exception as error:  # torchvision beside another torch is a RuntimeError; others raise what they like
            missing[name] = f"not importable here ({error})"
    return found, missing


def versions() -> dict[str, str]:
    """What `available` finds: the commit of a checkout, or the version that is installed."""
    found = {}
    for name, distribution in {"lightly": "lightly", "dinov2": "dinov2", "liger": "liger-kernel"}.items():
        checkout = _checkout(name)
        if checkout is not None:
            command = ["git", "-C", str(checkout), "rev-parse", "--short=10", "HEAD"]
            commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
            found[name] = commit or "a checkout"
            continue
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(distribution)
    return found


def _lightly(size: Size) -> Contender:
    module = _imported("lightly.loss.dino_loss", packages=("lightly.models", "lightly.models.modules"))
    loss = module.DINOLoss(size.prototypes, teacher_temp=TEACHER_TEMPERATURE, student_temp=STUDENT_TEMPERATURE)

    def call(inputs: Inputs) -> Tensor:
        student, teacher = _logits(inputs)
        return loss.to(student.device)(list(teacher.chunk(2)), list(student.chunk(size.ncrops)), TEACHER_TEMPERATURE)

    return call


def _dinov2(size: Size) -> Contender:
    module = _imported("dinov2.loss.dino_clstoken_loss")
    loss = module.DINOLoss(size.prototypes, student_temp=STUDENT_TEMPERATURE)

    def call(inputs: Inputs) -> Tensor:
        student, teacher = _logits(inputs)
        first, second = loss.to(student.device).softmax_center_teacher(teacher, TEACHER_TEMPERATURE).chunk(2)
        crops = student.chunk(size.ncrops)
        loss.update_center(teacher)
        total = loss([crops[0]], [second]) + loss([crops[1]], [first]) + loss(crops[2:], [first, second])
        return total / (2 * size.ncrops - 2)

    return call


def _liger(size: Size) -> Contender:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    # beta = 0 is KL(teacher || student). One temperature serves both sides, so ours divide the features.
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=True)

    def call(inputs: Inputs) -> Tensor:
        teacher_rows, weights = dino_pairs(size.images, size.ncrops, device=inputs.y.device)
        student, teacher = inputs.prototypes(), inputs.teacher_prototypes()
        no_labels = torch.zeros(size.images, dtype=torch.int64, device=inputs.y.device)
        total = torch.zeros((), device=inputs.y.device)
        for v, (rows, y) in enumerate(zip(teacher_rows.chunk(size.ncrops), inputs.y.chunk(size.ncrops), strict=True)):
            for u in range(2):
                if u != v:
                    pair = (
                        y / STUDENT_TEMPERATURE,
                        student,
                        inputs.teacher_y[rows[:, u]] / TEACHER_TEMPERATURE,
                        teacher,
                    )
                    total = total + loss(*pair, no_labels)
        return total * float(weights[0, 0]) * size.images

    return call


def _imported(name: str, *, packages: tuple[str, ...] = ()) -> ModuleType:
    """The module `name`, from a checkout if there is one, else as installed.

    From a checkout without the `__init__` of its packages, which import what a loss does not need.
    """
    root, package, _ = name.split(".")
    checkout = _checkout(root)
    if checkout is None:
        return importlib.import_module(name)
    for each in (root, f"{root}.{package}", *packages):
        sys.modules[each] = bare = ModuleType(each)
        bare.__path__ = [str(checkout.joinpath(*each.split(".")))]
    try:
        return importlib.import_module(name)
    finally:  # nobody else shall find bare packages
        for each in [each for each in sys.modules if each.partition(".")[0] == root]:
            del sys.modules[each]


def _checkout(name: str) -> Path | None:
    folder = os.environ.get("VMF_HEADS_UPSTREAM")
    path = Path(folder, name) if folder else None
    return path if path and path.is_dir() else None


def _logits(inputs: Inputs) -> tuple[Tensor, Tensor]:
    student = inputs.y @ inputs.prototypes().T
    with torch.no_grad():
        return student, inputs.teacher_y @ inputs.teacher_prototypes().T
