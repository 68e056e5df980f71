"""DINO's own projection head and loss as its training script defines them (Caron et al., ICCV 2021), for comparison."""

import warnings
from itertools import pairwise

import torch
from torch import Tensor, nn


class OriginalHead(nn.Module):
    """MLP, L2-normalised bottleneck, weight-normalised linear layer; the MLP is initialised before the last layer."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        use_bn: bool = False,
        norm_last_layer: bool = True,
        nlayers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
    ) -> None:
        super().__init__()
        widths = [in_dim, *[hidden_dim] * (max(nlayers, 1) - 1), bottleneck_dim]
        modules: list[nn.Module] = []
        for fan_in, fan_out in pairwise(widths):
            if modules:
                modules += [nn.BatchNorm1d(fan_in), nn.GELU()] if use_bn else [nn.GELU()]
            modules.append(nn.Linear(fan_in, fan_out))
        self.mlp = modules[0] if nlayers == 1 else nn.Sequential(*modules)
        for linear in (m for m in self.mlp.modules() if isinstance(m, nn.Linear)):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch prefers the parametrization; DINO uses this one
            self.last_layer = nn.utils.weight_norm(nn.Linear(bottleneck_dim, out_dim, bias=False))
        self.last_layer.weight_g.data.fill_(1)
        self.last_layer.weight_g.requires_grad = not norm_last_layer

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(nn.functional.normalize(self.mlp(x), dim=-1, p=2))


class OriginalLoss(nn.Module):
    """Cross-entropy of every pair of a global crop of the teacher and another crop of the student; a logit centre."""

    def __init__(
        self,
        out_dim: int,
        ncrops: int,
        warmup_teacher_temp: float,
        teacher_temp: float,
        warmup_teacher_temp_epochs: int,
        nepochs: int,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
    ) -> None:
        super().__init__()
        self.ncrops, self.student_temp, self.center_momentum = ncrops, student_temp, center_momentum
        self.register_buffer("center", torch.zeros(1, out_dim))
        warmup = torch.linspace(warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs, dtype=torch.float64)
        self.teacher_temps = warmup.tolist() + [teacher_temp] * (nepochs - warmup_teacher_temp_epochs)

    def forward(self, student_output: Tensor, teacher_output: Tensor, epoch: int) -> Tensor:
        teacher_output = teacher_output.detach()
        targets = torch.softmax((teacher_output - self.center) / self.teacher_temps[epoch], dim=-1).chunk(2)
        predictions = torch.log_softmax(student_output / self.student_temp, dim=-1).chunk(self.ncrops)
        losses = [
            torch.sum(-target * prediction, dim=-1).mean()
            for u, target in enumerate(targets)
            for v, prediction in enumerate(predictions)
            if u != v
        ]
        batch_center = teacher_output.mean(dim=0, keepdim=True)
        self.center = self.center * self.center_momentum + batch_center * (1 - self.center_momentum)
        return sum(losses) / len(losses)
