"""The contenders: how each one normalises its prototypes and centres its teacher."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vmf_heads import log_vmf_normalizer

NORMALIZATIONS = ("none", "l2", "vmf")
CENTRES = ("logit", "scores", "responsibilities", "targets")


@dataclass(frozen=True)
class Arm:
    """A cell of Table 1. Without log C_p, "scores" and "responsibilities" are the same centre."""

    name: str
    normalization: str
    centre: str


ARMS = (
    Arm("none, logit", "none", "logit"),
    Arm("none, probability", "none", "scores"),
    Arm("L2, logit", "l2", "logit"),
    Arm("L2, probability", "l2", "scores"),
    Arm("vMF, logit", "vmf", "logit"),
    Arm("vMF, scores", "vmf", "scores"),
    Arm("vMF, responsibilities", "vmf", "responsibilities"),
    Arm("vMF, targets", "vmf", "targets"),
)


def log_normalizer(arm: Arm, norms: Tensor, p: int, temperature: float) -> Tensor:
    """log C_p(||w_k|| / temperature) up to a constant (..., K); zeros for plain DINO and L2."""
    if arm.normalization != "vmf":
        return torch.zeros_like(norms)
    return log_vmf_normalizer(norms / temperature, p, relative=True)


class Centre:
    """c_k of several independent runs at once, (S, K), by any of the four rules.

    With r_k the softmax that the rule averages and m the momentum::

        logit             c <- m c + (1 - m) mean_b (<w, y_b>/tau + log C_p)                          Eq. 8
        scores            c <- m c + (1 - m) log mean_b softmax(<w, y_b>/tau)                         Eq. 9, as printed
        responsibilities  c <- m c + (1 - m) log mean_b softmax(<w, y_b>/tau + log C_p)               Eq. 9, by A.4
        targets           c <- c + (1 - m) (log mean_b softmax(<w, y_b>/tau + log C_p - c) + log K)   of the targets
    """

    def __init__(self, rule: str, shape: tuple[int, ...], momentum: float) -> None:
        self.rule, self.momentum = rule, momentum
        self.value = torch.zeros(shape)

    def update_(self, scaled: Tensor, log_normalizer: Tensor, targets: Tensor) -> None:
        """One step from `scaled` = <w, y>/tau (S, N, K), log C_p (S, K) and the `targets` (S, N, K) of this batch."""
        if self.rule == "logit":
            new = scaled.mean(1) + log_normalizer
        elif self.rule == "targets":
            new = self.value + log_mean(targets) + math.log(self.value.shape[-1])
        elif self.rule == "scores":
            new = log_mean(scaled.softmax(-1))
        else:
            new = log_mean((scaled + log_normalizer[:, None]).softmax(-1))
        self.value = self.value.lerp(new, 1 - self.momentum)


def log_mean(probabilities: Tensor) -> Tensor:
    """log mean over rows (S, K); the floor stands where no row gives a prototype anything that float32 can hold."""
    return probabilities.mean(1).clamp(min=torch.finfo(torch.float32).tiny).log()
