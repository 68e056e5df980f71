"""Which contenders meet which problems under which settings."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.mixture.arms import ARMS, Arm
from benchmarks.mixture.train import Settings

GridName = Literal["readings", "overlap", "norms", "stability"]


@dataclass(frozen=True)
class Case:
    """One training, of all seeds at once."""

    arm: Arm
    p: int
    settings: Settings
    kind: str = "cosines"


def readings() -> Iterator[Case]:
    """All arms, p from 8 to 256, norms at three speeds and with decay; fewer prototypes than clusters, too."""
    speeds = [(1.0, 0.0), (3.0, 0.0), (10.0, 0.0), (3.0, 0.1)]
    problems = [(64, 16), (64, 8), (64, 64), (64, 256), (8, 16), (8, 8)]
    for (prototypes, p), (speed, decay), arm in itertools.product(problems, speeds, ARMS):
        if arm.normalization != "l2" or speed == 1:  # norms that do not move have no speed
            yield Case(arm, p, Settings(prototypes=prototypes, norm_speed=speed, norm_decay=decay))


def overlap() -> Iterator[Case]:
    """All arms on clusters that overlap at every p; p = 16 is in `readings`."""
    for p, arm in itertools.product((64, 256, 8), ARMS):
        yield Case(arm, p, Settings(norm_speed=1.0 if arm.normalization == "l2" else 3.0), kind="overlap")


def norms() -> Iterator[Case]:
    """What makes kappa move: steps, speed, decay and the first norm."""
    arms = [arm for arm in ARMS if arm.name in ("none, logit", "vMF, responsibilities")]
    changes: list[dict[str, Any]] = [
        {"steps": 100},
        {"steps": 400},
        {},
        {"norm_speed": 10.0},
        {"norm_decay": 0.4},
        {"initial_norm": 4.0},
    ]
    cases = [(16, change) for change in changes] + [(64, change) for change in changes[:3]]
    for (p, change), arm in itertools.product(cases, arms):
        yield Case(arm, p, Settings(**change), kind="overlap")


def stability() -> Iterator[Case]:
    """One or two changes at a time that invite trouble, on clusters that overlap."""
    arms = [arm for arm in ARMS if arm.name not in ("L2, probability", "vMF, logit", "vMF, targets")]
    changes: list[dict[str, Any]] = [
        {"lr": 0.05},
        {"lr": 0.02, "norm_speed": 10.0},
        {"norm_speed": 100.0},
        {"batch": 16},
        {"batch": 16, "norm_speed": 10.0},
        {"teacher_temp": 0.02},
        {"center_momentum": 0.99, "norm_speed": 10.0},
    ]
    for change, arm in itertools.product(changes, arms):
        if arm.normalization != "l2" or "norm_speed" not in change:
            yield Case(arm, 16, Settings(**change), kind="overlap")


GRIDS: dict[GridName, Callable[[], Iterator[Case]]] = {
    "readings": readings,
    "overlap": overlap,
    "norms": norms,
    "stability": stability,
}
