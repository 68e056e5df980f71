"""What EsViT's networks return, and which region of the teacher a region of the student is matched with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..._matmul import at_least_float32, without_autocast
from ...prototypes import HeadOutput
from ...teacher import features_of

Output = Tensor | HeadOutput
# Of a model: what `head` returned for views, what `head_dense` returned for regions, the regions' features, and the
# numbers of regions of a global and of a local crop.
Outputs = tuple[Output, Output, Tensor, Sequence[int]]


class Crops:
    """What a model returned, with the numbers of its parts."""

    def __init__(self, output: Outputs, ncrops: int) -> None:
        self.views, self.regions, self.features, self.npatch = output
        self.ncrops = ncrops
        self.images = len(features_of(self.views)) // ncrops
        # Regions of each crop; a batch without local crops has one number only.
        self.sizes = [int(self.npatch[0])] * 2 + [int(self.npatch[-1])] * (ncrops - 2)


@torch.no_grad()
def matched_regions(student: Crops, teacher: Crops) -> tuple[Tensor, Tensor]:
    """(teacher_rows, weights) of regions (Ns, 2): each towards the most similar one of either global crop's teacher.

    As in `dino_pairs` -1 stands for the view that the region itself is of, and the weights make the sum EsViT's mean
    over regions, images and pairs of views.
    """
    images, size = teacher.images, teacher.sizes[0]
    device = teacher.features.device
    with without_autocast(device):
        unit = [F.normalize(at_least_float32(crops.features), dim=1) for crops in (student, teacher)]
        of_teacher = unit[1].view(2, images, size, -1)
        rows, weights = [], []
        first = size * torch.arange(2 * images, device=device).view(2, images, 1)  # of an image's regions
        for view, of_student in enumerate(unit[0].split([images * n for n in student.sizes])):
            similarity = of_student.view(images, student.sizes[view], -1) @ of_teacher.mT  # (2, B, T_s, T_t)
            nearest = first + similarity.argmax(dim=3)
            if view < 2:
                nearest[view] = -1
            rows.append(nearest.flatten(1).T)
            pairs = images * student.sizes[view] * 2 * (student.ncrops - 1)
            weights.append(torch.full(rows[-1].shape, 1 / pairs, dtype=torch.float64, device=device))
    return torch.cat(rows), torch.cat(weights)
