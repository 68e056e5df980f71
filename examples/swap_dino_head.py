"""A DINO training loop in the style of the original, and the lines that make it DINO-vMF.

    python examples/swap_dino_head.py          # DINO
    python examples/swap_dino_head.py --vmf    # DINO-vMF

It trains a small convolutional network on the digits inside scikit-learn, two large and two small crops of each, in
well under a minute on one CPU core. The three lines that `--vmf` switches are marked "vMF"; all else is the same loop.
"""

from __future__ import annotations

import argparse
import copy
import math
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from vmf_heads.compat.dino import DINOHead as VMFDINOHead
from vmf_heads.compat.dino import DINOLoss as VMFDINOLoss

OUT_DIM, NCROPS = 256, 4


class DINOHead(nn.Module):
    """MLP, L2-normalised bottleneck, weight-normalised prototypes."""

    def __init__(
        self, in_dim: int, out_dim: int, norm_last_layer: bool = True, hidden_dim: int = 2048, bottleneck_dim: int = 256
    ) -> None:
        super().__init__()
        widths = (in_dim, hidden_dim, hidden_dim, bottleneck_dim)
        first, second, last = (nn.Linear(*pair) for pair in pairwise(widths))
        self.mlp = nn.Sequential(first, nn.GELU(), second, nn.GELU(), last)
        for linear in (first, second, last):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        self.last_layer = weight_norm(nn.Linear(bottleneck_dim, out_dim, bias=False))
        norms = self.last_layer.parametrizations.weight.original0
        norms.data.fill_(1)
        norms.requires_grad = not norm_last_layer

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, out_dim) of features (N, in_dim)."""
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))


class DINOLoss(nn.Module):
    """Cross-entropy of teacher and student over pairs of crops; the teacher's logits are centred."""

    def __init__(
        self,
        out_dim: int,
        ncrops: int,
        warmup_teacher_temp: float,
        teacher_temp: float,
        warmup_teacher_temp_epochs: int,
        nepochs: int,
        student_temp: float = 0.1,
    ) -> None:
        super().__init__()
        self.ncrops, self.student_temp = ncrops, student_temp
        warmup = np.linspace(warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs)
        self.teacher_temp_schedule = np.append(warmup, [teacher_temp] * (nepochs - warmup_teacher_temp_epochs))
        self.register_buffer("center", torch.zeros(1, out_dim))

    def forward(self, student_output: Tensor, teacher_output: Tensor, epoch: int) -> Tensor:
        """The mean over pairs of a teacher's and another student's crop; then the centre is updated."""
        teacher_temp = self.teacher_temp_schedule[epoch]
        targets = F.softmax((teacher_output - self.center) / teacher_temp, dim=-1).detach().chunk(2)
        predictions = F.log_softmax(student_output / self.student_temp, dim=-1).chunk(self.ncrops)
        losses = [
            -(q * p).sum(dim=-1).mean() for u, q in enumerate(targets) for v, p in enumerate(predictions) if u != v
        ]
        self.center.lerp_(teacher_output.detach().mean(dim=0, keepdim=True), 0.1)
        return torch.stack(losses).mean()


def build_backbone() -> nn.Module:
    """Features (N, 64) of images (N, 1, H, W) of any size."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.GELU(),
        nn.Conv2d(32, 64, 3, padding=1, stride=2),
        nn.BatchNorm2d(64),
        nn.GELU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(256, 64),
    )


class MultiCropWrapper(nn.Module):
    """Backbone on the crops of each size together, head on all of them."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, crops: list[Tensor]) -> Tensor:
        """Outputs of the head, crop by crop."""
        sizes = sorted({crop.shape[-1] for crop in crops}, reverse=True)
        same = ([crop for crop in crops if crop.shape[-1] == size] for size in sizes)
        return self.head(torch.cat([self.backbone(torch.cat(group)) for group in same]))


def random_crops(images: Tensor) -> list[Tensor]:
    """Two crops of 7 x 7 and two of 5 x 5 pixels, brightened and with noise."""
    crops = []
    for size in (7, 7, 5, 5):
        top, left = torch.randint(images.shape[-1] - size + 1, (2,)).tolist()
        crop = images[:, :, top : top + size, left : left + size]
        gain = 0.8 + 0.4 * torch.rand(len(images), 1, 1, 1)
        crops.append(crop * gain + 0.1 * torch.randn_like(crop))
    return crops


def main(vmf: bool, epochs: int, batch_size: int = 64) -> list[float]:
    """Train, print a line per epoch, and return the mean loss of every epoch."""
    torch.manual_seed(0)
    images = torch.as_tensor(load_digits().images / 8 - 1, dtype=torch.float32).unsqueeze(1)

    Head, Loss = (VMFDINOHead, VMFDINOLoss) if vmf else (DINOHead, DINOLoss)  # vMF
    norm_last_layer = not vmf  # vMF: the norms of the prototypes are what there is to learn
    head = Head(64, OUT_DIM, norm_last_layer=norm_last_layer, hidden_dim=256, bottleneck_dim=64)
    student = MultiCropWrapper(build_backbone(), head)
    teacher = copy.deepcopy(student).requires_grad_(False)
    dino_loss = Loss(OUT_DIM, NCROPS, 0.04, 0.05, epochs // 2, epochs)
    if vmf:
        dino_loss.attach(student, teacher)  # vMF

    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=5e-4, weight_decay=0.04)
    steps = len(images) // batch_size
    mean_losses = []
    for epoch in range(epochs):
        losses = []
        for step, indices in enumerate(torch.randperm(len(images))[: steps * batch_size].view(steps, batch_size)):
            crops = random_crops(images[indices])
            teacher_output = teacher(crops[:2])
            student_output = student(crops)
            loss = dino_loss(student_output, teacher_output, epoch)

            optimizer.zero_grad()
            loss.backward()
            if epoch == 0:  # the first epoch keeps the last layer as it is
                for name, parameter in student.named_parameters():
                    if "last_layer" in name:
                        parameter.grad = None
            optimizer.step()

            with torch.no_grad():  # EMA of the teacher
                progress = (epoch + step / steps) / epochs
                momentum = 1 - 0.004 * (math.cos(math.pi * progress) + 1) / 2
                for of_student, of_teacher in zip(student.parameters(), teacher.parameters(), strict=True):
                    of_teacher.lerp_(of_student, 1 - momentum)
            losses.append(loss.item())
        mean_losses.append(float(np.mean(losses)))
        kappa = student.head.last_layer.weight.norm(dim=1) / dino_loss.student_temp
        print(
            f"epoch {epoch}: loss {mean_losses[-1]:.3f} (ln K = {math.log(OUT_DIM):.3f}), "
            f"kappa {kappa.min():.2f} to {kappa.max():.2f}",
            flush=True,
        )
    return mean_losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vmf", action="store_true", help="DINO-vMF instead of DINO")
    parser.add_argument("--epochs", type=int, default=10, help="passes over the 1797 digits")
    arguments = parser.parse_args()
    main(arguments.vmf, arguments.epochs)
