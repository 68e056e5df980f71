"""The sizes that are measured, and random inputs of such a size."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vmf_heads import HeadOutput
from vmf_heads.prototypes import prototype_log_normalizer

STUDENT_TEMPERATURE, TEACHER_TEMPERATURE = 0.1, 0.04


@dataclass(frozen=True)
class Size:
    """`ncrops` crops of `images` images; ncrops = 0: patches, each with a target at its own position (iBOT).

    A `brief` size takes minutes on a CPU: only the plain and the fused loss, from the head's parameters.
    """

    name: str
    ncrops: int
    images: int
    prototypes: int
    dimension: int = 256
    brief: bool = False

    def __str__(self) -> str:
        rows = f"{self.ncrops} × {self.images}" if self.ncrops else f"{self.images:,} patches"
        return f"{self.name}, {rows}, K = {self.prototypes:,}"


SIZES = {
    "cpu": [
        Size("small", 6, 16, 8192, 128),
        Size("DINO", 10, 16, 65536),
        Size("DINO", 12, 32, 65536),
        Size("iBOT", 0, 2048, 8192),
        Size("ViT-S/16", 10, 64, 65536, brief=True),
        Size("ViT-B/16", 12, 64, 65536, brief=True),
        Size("ViT-S/16", 10, 128, 65536, brief=True),
        Size("ViT-B/16", 12, 128, 65536, brief=True),
    ],
    "cuda": [
        Size("ViT-S/16", 10, 64, 65536),
        Size("ViT-B/16", 12, 64, 65536),
        Size("ViT-S/16", 10, 128, 65536),
        Size("ViT-B/16", 12, 128, 65536),
        Size("DINOv2", 10, 64, 131072),
        Size("iBOT", 0, 25088, 8192),
    ],
}
QUICK = [Size("small", 6, 16, 8192, 128), Size("patches", 0, 256, 8192, 128)]


class Inputs:
    """Features, prototypes and a centre. `leaves` carry gradients.

    With `weight_norm` the leaves are the parameters of a head, and `prototypes` makes its prototypes of them.
    """

    def __init__(self, size: Size, device: str, *, weight_norm: bool) -> None:
        torch.manual_seed(0)
        self.size, self.weight_norm = size, weight_norm
        rows = size.images * max(size.ncrops, 1)
        teacher_rows = size.images * (2 if size.ncrops else 1)
        k, p = size.prototypes, size.dimension
        self.y = normalize(torch.randn(rows, p, device=device)).requires_grad_()
        self.teacher_y = normalize(torch.randn(teacher_rows, p, device=device))
        norms = torch.empty(2, k, 1, device=device).uniform_(0.5, 3)
        directions = normalize(torch.randn(2, k, p, device=device), dim=2)
        # Clones: every one is memory of its own, as parameters are.
        self._v, self._g = directions[0].clone().requires_grad_(), norms[0].clone().requires_grad_()
        self._teacher_v, self._teacher_g = directions[1].clone(), norms[1].clone()
        self._w = (norms[0] * directions[0]).requires_grad_()
        self._teacher_w = norms[1] * directions[1]
        self.center = torch.zeros(1, k, device=device)
        # A loss leaves here what its centre is updated from, so that no compiler leaves it out. No loss reads it.
        self.statistics: Tensor | None = None

    @property
    def student(self) -> HeadOutput:
        """What the student's head hands to the fused loss."""
        return (
            HeadOutput(self.y, self._v, self._g.squeeze(1)) if self.weight_norm else HeadOutput(self.y, self._w, None)
        )

    @property
    def teacher(self) -> HeadOutput:
        """What the teacher's head hands to it."""
        if self.weight_norm:
            return HeadOutput(self.teacher_y, self._teacher_v, self._teacher_g.squeeze(1))
        return HeadOutput(self.teacher_y, self._teacher_w, None)

    def prototypes(self) -> Tensor:
        """The student's (K, p)."""
        return self.student.prototypes

    def teacher_prototypes(self) -> Tensor:
        """The teacher's (K, p)."""
        return self.teacher.prototypes

    def log_normalizers(self) -> tuple[Tensor, Tensor]:
        """log C_p of the student's prototypes, with a gradient, and of the teacher's, (K,) each."""
        pairs = (self.student, STUDENT_TEMPERATURE), (self.teacher, TEACHER_TEMPERATURE)
        student, teacher = (prototype_log_normalizer(head.norms, self.size.dimension, tau) for head, tau in pairs)
        return student, teacher

    @cached_property
    def leaves(self) -> list[Tensor]:
        """What a step leaves a gradient on."""
        return [self.y, self._v, self._g] if self.weight_norm else [self.y, self._w]
