"""The sizes that are measured, and random inputs of such a size."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vmf_heads._prototypes import prototype_log_normalizer

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
    """Features, prototypes, log C_p and a centre. `leaves` carry gradients.

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
        self._b = self._log_c(self._g, STUDENT_TEMPERATURE).detach().requires_grad_()
        self._teacher_b = self._log_c(self._teacher_g, TEACHER_TEMPERATURE)
        self.center = torch.zeros(1, k, device=device)

    def prototypes(self) -> Tensor:
        """The student's (K, p)."""
        return torch._weight_norm(self._v, self._g, 0) if self.weight_norm else self._w

    def teacher_prototypes(self) -> Tensor:
        """The teacher's (K, p)."""
        return torch._weight_norm(self._teacher_v, self._teacher_g, 0) if self.weight_norm else self._teacher_w

    def operands(self) -> dict[str, Tensor | None]:
        """Both sets of prototypes as `prototype_cross_entropy` takes them."""
        if not self.weight_norm:
            return {"student_prototypes": self._w, "teacher_prototypes": self._teacher_w}
        return {
            "student_prototypes": self._v,
            "student_scale": self._g.squeeze(1),
            "teacher_prototypes": self._teacher_v,
            "teacher_scale": self._teacher_g.squeeze(1),
        }

    def log_normalizers(self) -> tuple[Tensor, Tensor]:
        """log C_p of the student's prototypes, with a gradient, and of the teacher's, (K,) each."""
        if not self.weight_norm:
            return self._b, self._teacher_b
        return self._log_c(self._g, STUDENT_TEMPERATURE), self._log_c(self._teacher_g, TEACHER_TEMPERATURE)

    @cached_property
    def leaves(self) -> list[Tensor]:
        """What a step leaves a gradient on (log C_p only where the contender has it)."""
        return [self.y, self._v, self._g] if self.weight_norm else [self.y, self._w, self._b]

    def _log_c(self, norms: Tensor, temperature: float) -> Tensor:
        return prototype_log_normalizer(norms.squeeze(1), self.size.dimension, temperature)
