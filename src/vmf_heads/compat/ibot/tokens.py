"""What iBOT's heads return: one output for [CLS] tokens, one for patches; and the shapes they must have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...prototypes import HeadOutput
from ...teacher import features_of, with_prototypes
from .head import iBOTHead

# Of an attached head: logits or scores, or features, or features with the prototypes they belong to.
Output = Tensor | HeadOutput


class Tokens(NamedTuple):
    """The outputs for [CLS] tokens and for patches."""

    cls: Any  # Output
    patch: Any

    def with_local(self, local_cls: Output | None) -> Tokens:
        """With the [CLS] tokens of the local crops behind the others."""
        if local_cls is None:
            return self
        rows = torch.cat([features_of(self.cls), features_of(local_cls)])
        return self._replace(cls=self.cls._replace(features=rows) if isinstance(self.cls, HeadOutput) else rows)

    def with_prototypes(self, head: iBOTHead) -> Tokens:
        """Features with the prototypes they belong to."""
        return Tokens(with_prototypes(self.cls, head.last_layer), with_prototypes(self.patch, head.last_layer2))

    def patches(self, index: Tensor) -> HeadOutput:
        """The patches of these row numbers as a `HeadOutput`, with features (len(index), p)."""
        return self.patch._replace(features=self.patch.features.flatten(0, 1)[index])


def check_shapes(
    student: Tokens,
    teacher: Tokens,
    student_mask: Sequence[Tensor],
    ngcrops: int,
    ncrops: int,
    columns: tuple[tuple[str, int], tuple[str, int]],
) -> None:
    """Raise ValueError unless all fit; `columns`: of [CLS] and of patches, the name of a dimension and its value."""
    (cls_name, of_cls), (patch_name, of_patch) = columns
    student_cls, student_patch = (features_of(x) for x in student)
    teacher_cls, teacher_patch = (features_of(x) for x in teacher)
    images, left_over = divmod(len(teacher_cls), ngcrops)
    if left_over or teacher_cls.shape[1:] != (of_cls,):
        raise ValueError(
            f"`teacher_output[0]` (of shape {tuple(teacher_cls.shape)}) must be (`ngcrops` * B, `{cls_name}`) with "
            f"`ngcrops` (={ngcrops}) and `{cls_name}` (={of_cls})"
        )
    if student_cls.shape != (ncrops * images, of_cls):
        raise ValueError(
            f"`student_output[0]` and `student_local_cls` (together of shape {tuple(student_cls.shape)}) must be "
            f"(`ncrops` * B, `{cls_name}`) = {(ncrops * images, of_cls)} for B={images}"
        )
    for name, patches in (("student_output[1]", student_patch), ("teacher_output[1]", teacher_patch)):
        if patches.dim() != 3 or len(patches) != len(teacher_cls) or patches.shape[2] != of_patch:
            raise ValueError(
                f"`{name}` (of shape {tuple(patches.shape)}) must be ({len(teacher_cls)}, N, `{patch_name}`) with "
                f"`{patch_name}` (={of_patch})"
            )
    tokens = student_patch.shape[1]
    shapes = [tuple(mask.shape) for mask in student_mask[:ngcrops]]
    if len(shapes) < ngcrops or any(len(s) != 3 or s[0] != images or s[1] * s[2] != tokens for s in shapes):
        raise ValueError(
            f"`student_mask` (of shapes {shapes}) must hold a mask (B, H, W) for each of the {ngcrops} global crops, "
            f"with B={images} and H * W={tokens}"
        )
