"""What the three scripts of this folder train with: scikit-learn's digits, four crops of each, and a small network."""

import copy

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import Dataset

from vmf_heads.compat.dino import DINOHead, DINOLoss

EPOCHS, CROPS, PROTOTYPES = 3, 4, 64


class Crops(Dataset):
    """Four crops (4, 1, 8, 8) of each digit, the two global ones first: shifted, and the local ones covered in part.

    They depend on the epoch and on the index alone, so that a training that was interrupted sees the same ones again.
    """

    def __init__(self) -> None:
        self.images = torch.from_numpy(load_digits().images).float().unsqueeze(1) / 16
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.epoch * len(self) + index)
        crops = []
        for crop in range(CROPS):
            rows, columns, cover = torch.randint(-1, 2, (3,), generator=generator).tolist()
            image = torch.roll(self.images[index], (rows, columns), dims=(1, 2))
            if crop >= 2:
                image[:, :, 4 + cover :] = 0
            crops.append(image)
        return torch.stack(crops)


def networks() -> tuple[nn.Module, nn.Module, DINOLoss]:
    """A student, its teacher, and the loss, not yet attached: that comes after student and teacher are wrapped."""
    torch.manual_seed(0)
    backbone = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.GELU(), nn.Conv2d(16, 32, 3, 2, 1), nn.GELU(), nn.Flatten()
    )
    student = nn.Sequential(backbone, DINOHead(32 * 4 * 4, PROTOTYPES, hidden_dim=64, bottleneck_dim=16))
    teacher = copy.deepcopy(student).requires_grad_(False)
    loss = DINOLoss(
        PROTOTYPES, CROPS, 0.04, 0.07, warmup_teacher_temp_epochs=1, nepochs=EPOCHS, center_start="first_batch"
    )
    return student, teacher, loss


@torch.no_grad()
def ema(teacher: nn.Module, student: nn.Module, momentum: float = 0.99) -> None:
    """Move the teacher's parameters towards the student's."""
    for theirs, ours in zip(teacher.parameters(), student.parameters(), strict=True):
        theirs.lerp_(ours, 1 - momentum)
