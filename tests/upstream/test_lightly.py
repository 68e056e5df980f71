"""lightly-ai/lightly: its examples dino.py and dinov2.py with the documented diffs, on CPU without torchvision."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from upstream.checkouts import (
    EVERY_MISTAKE,
    MISTAKES,
    Training,
    check_equations,
    check_goes_on,
    check_power,
    check_raises,
    check_same_training,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Training:
    return Training("lightly", "lightly-ai/lightly", "train_lightly.py", tmp_path_factory)


@pytest.fixture(scope="module")
def original(train: Training) -> dict[str, Any]:
    return train([], diff=False, unit=True)


def test_at_norm_one_with_logit_centring_training_is_the_original_one(train, original):
    """Four steps over two epochs: lightly's EMA, gradient cancelling, temperature warm-up and, here, SGD."""
    got = train([], unit=True, centering="logit", start_of=str(original["file"]))
    check_same_training(got, original)


def test_loss_and_gradients_are_those_of_the_equations(train):
    """Eq. 6, 7 and 9 in float64 with norms from 0.4 to 4, at both teacher temperatures, under the example's Adam."""
    result = train([], norms=True, compare=True)
    check_equations(result, ["log_center"])
    check_power(result)
    assert not torch.equal(result["student"]["student_head.last_layer.weight_g"], torch.linspace(0.4, 4, 2048)[:, None])


def test_save_and_restore(train, tmp_path):
    """Stopped after one epoch and resumed from the states of its parts, the script is the one that was not stopped."""
    check_goes_on(partial(train, []), tmp_path / "checkpoint.pt", at=1, norms=True)


@EVERY_MISTAKE
def test_wrong_use_raises(train, mistake):
    check_raises(train, mistake, [])


@pytest.fixture(scope="module")
def train_dinov2(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    training = Training("lightly", "lightly-ai/lightly", "train_lightly_dinov2.py", tmp_path_factory)
    return partial(training, [], diffs=slice(1, 2))


HEADS = pytest.mark.parametrize("separate", [False, True], ids=["shared head", "separate heads"])


@HEADS
def test_dinov2_at_norm_one_with_logit_centring_is_the_original_one(train_dinov2, separate):
    """Four steps of [CLS], patch and KoLeo losses with lightly's masks, EMA and schedules."""
    original = train_dinov2(diff=False, unit=True, separate=separate)
    got = train_dinov2(unit=True, separate=separate, centering="logit", start_of=str(original["file"]))
    check_same_training(got, original)


@HEADS
def test_dinov2_loss_and_gradients_are_those_of_the_equations(train_dinov2, separate):
    """Eq. 6, 7 and 9 in float64 for both objectives, with norms from 0.4 to 4, under the example's AdamW."""
    result = train_dinov2(norms=True, compare=True, separate=separate)
    check_equations(result, ["dino.log_center", "ibot.log_center"])
    check_power(result)


def test_dinov2_save_and_restore(train_dinov2, tmp_path):
    check_goes_on(train_dinov2, tmp_path / "checkpoint.pt", at=1, norms=True, separate=True)


@pytest.mark.parametrize(
    "name", ["teacher first", "no attach"]
)  # the script is warned of heads that did not run anyway
def test_dinov2_wrong_use_raises(train_dinov2, name):
    check_raises(train_dinov2, MISTAKES[name], separate=True)
