"""Train the prototypes of a student and an EMA teacher on views of a known mixture, several seeds side by side."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.mixture.arms import Arm, Centre, log_normalizer
from benchmarks.mixture.problem import Problem


@dataclass(frozen=True)
class Settings:
    """Of a run. `norm_speed` multiplies the learning rate of the norms, `norm_decay` is AdamW's weight decay on them,
    `initial_norm` what they start from (1 in DINO)."""

    prototypes: int = 64
    norm_speed: float = 1.0
    norm_decay: float = 0.0
    initial_norm: float = 1.0
    steps: int = 1500
    batch: int = 256
    lr: float = 5e-3
    student_temp: float = 0.1
    teacher_temp: float = 0.05
    teacher_momentum: float = 0.99
    center_momentum: float = 0.9


class Run:
    """S independent runs of `compat.dino` without an encoder: only prototypes, norms and centre can move."""

    def __init__(self, arm: Arm, settings: Settings, directions: Tensor) -> None:
        self.arm, self.settings, self.p = arm, settings, directions.shape[-1]
        self.directions = directions.clone().requires_grad_()  # (S, K, p)
        self.scales = torch.full(directions.shape[:2], settings.initial_norm).requires_grad_()  # (S, K)
        groups = [{"params": [self.directions], "weight_decay": 0.0}]
        if arm.normalization != "l2":
            lr = settings.lr * settings.norm_speed
            groups.append({"params": [self.scales], "lr": lr, "weight_decay": settings.norm_decay})
        self.optimizer = torch.optim.AdamW(groups, lr=settings.lr)
        self.teacher = [self.directions.detach().clone(), self.scales.detach().clone()]
        self.centre = Centre(arm.centre, tuple(self.scales.shape), settings.center_momentum)

    def step(self, views: Tensor) -> Tensor:
        """One step of all runs on `views` (S, 2 B, p), view by view; returns the losses (S,)."""
        tau = self.settings.student_temp
        with torch.no_grad():
            scaled, log_c = self._scaled(views, *self.teacher, self.settings.teacher_temp)
            targets = (scaled + (log_c - self.centre.value)[:, None]).softmax(-1)
            self.centre.update_(scaled, log_c, targets)
        scaled, log_c = self._scaled(views, self.directions, self.scales, tau)
        log_probabilities = (scaled + log_c[:, None]).log_softmax(-1)
        other_view = targets.roll(views.shape[1] // 2, 1)
        losses = -(other_view * log_probabilities).sum(-1).mean(1)
        self.optimizer.zero_grad()
        losses.sum().backward()  # the runs share no parameter, so each gets its own gradient
        self.optimizer.step()
        with torch.no_grad():
            for ours, theirs in zip(self.teacher, (self.directions, self.scales), strict=True):
                ours.lerp_(theirs, 1 - self.settings.teacher_momentum)
        return losses.detach()

    def _scaled(self, y: Tensor, directions: Tensor, scales: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """<w, y>/temperature (S, N, K) and log C_p (S, K)."""
        prototypes = scales[..., None] * F.normalize(directions, dim=-1)
        log_c = log_normalizer(self.arm, scales.abs(), self.p, temperature)
        return y @ (prototypes / temperature).mT, log_c

    @torch.no_grad()
    def teacher_logits(self, y: Tensor) -> dict[str, Tensor]:
        """What the teacher makes of `y` (S, N, p): its scores, its logits at the student's temperature, its targets."""
        at_student, log_c_student = self._scaled(y, *self.teacher, self.settings.student_temp)
        at_teacher, log_c = self._scaled(y, *self.teacher, self.settings.teacher_temp)
        return {
            "scores": at_student,
            "logits": at_student + log_c_student[:, None],
            "targets": (at_teacher + (log_c - self.centre.value)[:, None]).log_softmax(-1),
        }


def train(arm: Arm, settings: Settings, problem: Problem, seed: int) -> tuple[Run, Tensor]:
    """The trained runs and their losses (steps, S)."""
    generator = torch.Generator().manual_seed(seed)
    seeds, *_, p = problem.points.shape
    run = Run(arm, settings, torch.randn(seeds, settings.prototypes, p, generator=generator))
    losses = [run.step(problem.views(settings.batch, generator)) for _ in range(settings.steps)]
    return run, torch.stack(losses)
