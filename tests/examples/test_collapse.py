"""The detector: what stops a run, what does not, and a run that is made to collapse."""

import math
from typing import Any

import pytest

from training.collapse import CollapseDetector, TrainingCollapsed

LOG_K = math.log(100)
UNIFORM = {"target_entropy": LOG_K, "marginal_entropy": LOG_K, "kl": 0.0}
ALIKE = {"target_entropy": 0.8 * LOG_K, "marginal_entropy": 0.8 * LOG_K, "kl": 0.3}
ONE_TAKES_ALL = {"target_entropy": 0.01, "marginal_entropy": 0.02, "kl": 0.3}
LEARNING = {"target_entropy": 0.3 * LOG_K, "marginal_entropy": 0.9 * LOG_K, "kl": 0.1}
NOT_YET_MATCHED = {"target_entropy": LOG_K, "marginal_entropy": LOG_K, "kl": 1.0}  # as in the first steps of a run


@pytest.mark.parametrize(
    ("statistics", "message"),
    [
        (UNIFORM, r"for 5 steps now: all targets are uniform .* ln K = 4.61. A lower `teacher_temp`"),
        (ALIKE, r"the same for every image and spread over many prototypes. A lower `teacher_temp`"),
        (ONE_TAKES_ALL, r"one prototype, or the same few, has taken all images. Centring prevents that"),
    ],
)
def test_a_window_of_collapsed_steps_stops(statistics: dict[str, float], message: str) -> None:
    detector = CollapseDetector(100, window=5, images=16)
    for _ in range(4):
        detector.update(statistics)
    assert detector.suspicious
    detector.update(LEARNING)  # one step that learns, and the count begins anew
    assert not detector.suspicious
    for _ in range(4):
        detector.update(statistics)
    with pytest.raises(TrainingCollapsed, match=message):
        detector.update(statistics)


@pytest.mark.parametrize(
    ("statistics", "options"),
    [
        (LEARNING, {}),
        (ONE_TAKES_ALL, {"images": 4}),
        (NOT_YET_MATCHED, {"images": 4}),
        (UNIFORM, {"window": 0}),
    ],
)
def test_what_does_not_stop(statistics: dict[str, float], options: dict[str, Any]) -> None:
    detector = CollapseDetector(100, **{"window": 5, "images": 16} | options)
    for _ in range(50):
        detector.update(statistics)
    assert not detector.suspicious


def test_uniform_targets_of_few_images_stop_too() -> None:
    detector = CollapseDetector(100, window=1, images=1)
    with pytest.raises(TrainingCollapsed, match="all targets are uniform"):
        detector.update(UNIFORM)
