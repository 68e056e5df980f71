"""DINO with a small convolutional network on Fashion-MNIST, with the library's own head and loss."""

import copy
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.fashion.data import Images, random_crops
from vmf_heads.compat.dino import DINOHead, DINOLoss
from vmf_heads.optim import separate_norms

PERIODS = 20
"""Use and norms of the prototypes are looked at in so many equal parts of a training."""


@dataclass(frozen=True)
class Settings:
    """Of one training; `norm_speed` multiplies the learning rate of the prototypes' norms, which are not decayed.

    `clip` is the largest norm of the gradient, 0: none. In bfloat16 networks and loss run in autocast.
    """

    normalization: str = "vmf"
    centering: str = "probability"
    center_on: str = "scores"
    norm_speed: float = 10.0
    steps: int = 600
    batch: int = 128
    prototypes: int = 256
    bottleneck: int = 8
    hidden: int = 256
    widths: tuple[int, ...] = (16, 32, 64)
    pool: int = 4
    lr: float = 5e-3
    warmup: int = 60
    weight_decay: float = 0.04
    student_temp: float = 0.1
    teacher_temp: float = 0.05
    teacher_momentum: float = 0.99
    global_scale: tuple[float, float] = (0.3, 1.0)
    strength: float = 0.4
    head_layers: int = 3
    clip: float = 3.0
    precision: Literal["float32", "bfloat16"] = "float32"


class Network(nn.Module):
    """Convolutions of stride 2 down to 4 x 4, average pooling: `backbone`; then DINO's projection `head`."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for kernel, before, after in zip((5, 3, 3), (1, *settings.widths), settings.widths, strict=False):
            layers += [nn.Conv2d(before, after, kernel, 2, kernel // 2, bias=False), nn.BatchNorm2d(after), nn.GELU()]
        self.backbone = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(settings.pool), nn.Flatten())
        self.head = DINOHead(
            settings.widths[-1] * settings.pool**2,
            settings.prototypes,
            norm_last_layer=settings.normalization == "l2",
            hidden_dim=settings.hidden,
            bottleneck_dim=settings.bottleneck,
            nlayers=settings.head_layers,
            normalizer="vmf" if settings.normalization == "vmf" else "none",
        )

    def forward(self, x: Tensor) -> Tensor:
        """What the head returns for images (N, 1, 28, 28)."""
        return self.head(self.backbone(x.contiguous(memory_format=torch.channels_last)))


@dataclass
class Trained:
    """The networks and the loss after training, and what was seen on the way.

    Of every step: the loss, and the norm of the gradient before clipping. Of every period of the training: the share of
    the prototypes that were the largest target of some crop, and the largest norm of a student's prototype at its end.
    """

    teacher: Network
    student: Network
    loss: DINOLoss
    losses: list[float] = field(default_factory=list)
    gradients: list[float] = field(default_factory=list)
    used_over_time: list[float] = field(default_factory=list)
    largest_norm: list[float] = field(default_factory=list)


def train(settings: Settings, images: Images, seed: int) -> Trained:
    """Two crops per image, every one of them seen by the student and the EMA teacher.

    Stops after a step whose loss is not finite.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    student = Network(settings).to(memory_format=torch.channels_last)
    teacher = copy.deepcopy(student)
    loss_fn = DINOLoss(
        settings.prototypes,
        2,
        settings.teacher_temp,
        settings.teacher_temp,
        0,
        1,
        settings.student_temp,
        centering=settings.centering,
        center_on=settings.center_on,
    )
    loss_fn.attach(student, teacher)
    trained = Trained(teacher, student, loss_fn)
    optimizer = torch.optim.AdamW(_groups(student, settings))
    won = torch.zeros(settings.prototypes, dtype=torch.bool)
    period = math.ceil(settings.steps / PERIODS)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=settings.precision == "bfloat16")
    for step in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = _lr(step, settings) * group.get("lr_multiplier", 1.0)
        x = images.x[torch.randint(len(images.x), (settings.batch,), generator=generator)]
        crops = torch.cat(
            [random_crops(x, settings.global_scale, generator, strength=settings.strength) for _ in range(2)]
        )
        with autocast:
            with torch.no_grad():
                teacher_output = teacher(crops)
                won[loss_fn.targets(teacher_output, 0).argmax(1)] = True
            loss = loss_fn(student(crops), teacher_output, 0)
        optimizer.zero_grad()
        loss.backward()
        gradient = nn.utils.clip_grad_norm_(student.parameters(), settings.clip or math.inf)
        optimizer.step()
        with torch.no_grad():
            for ours, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
                ours.lerp_(theirs, 1 - settings.teacher_momentum)
        trained.losses.append(loss.item())
        trained.gradients.append(gradient.item())
        if not math.isfinite(trained.losses[-1]):
            break
        if (step + 1) % period == 0:
            trained.used_over_time.append(float(won.float().mean()))
            trained.largest_norm.append(float(student.head.last_layer.norms.detach().max()))
            won.zero_()
    return trained


def _groups(student: Network, settings: Settings) -> list[dict[str, Any]]:
    parameters = list(student.parameters())
    groups: list[dict[str, Any]] = [
        {"params": [x for x in parameters if x.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [x for x in parameters if x.ndim == 1], "weight_decay": 0.0},
    ]
    if settings.normalization == "l2":
        return groups  # the norms are frozen
    return separate_norms(groups, student, lr=settings.lr, lr_multiplier=settings.norm_speed)


def _lr(step: int, settings: Settings) -> float:
    """Linear warm-up, then half a cosine down to 0."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * progress))
