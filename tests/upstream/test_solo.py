"""vturrisi/solo-learn: its DINO module with the documented diff, through its own hooks, without Lightning."""

from typing import Any

import pytest
import torch

from upstream.checkouts import (
    EVERY_MISTAKE,
    Training,
    check_equations,
    check_power,
    check_raises,
    check_same_training,
)

pytestmark = pytest.mark.slow
FUSED = pytest.mark.parametrize("fused", [False, True])


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Training:
    return Training("solo-learn", "vturrisi/solo-learn", "train_solo.py", tmp_path_factory)


@pytest.fixture(scope="module")
def original(train: Training) -> dict[str, Any]:
    return train([], diff=False, unit=True)


@pytest.fixture(scope="module")
def trained(train: Training) -> dict[str, Any]:
    return train([], norms=True, compare=True)


@FUSED
def test_at_norm_one_with_logit_centring_training_is_the_original_one(train, original, fused):
    """Four steps over two epochs: solo-learn's optimiser groups, clipping, frozen last layer, classifier and EMA."""
    got = train([], unit=True, centering="logit", fused=fused, start_of=str(original["file"]))
    check_same_training(got, original)


@FUSED
def test_loss_and_gradients_are_those_of_the_equations(train, trained, fused):
    """Eq. 6, 7 and 9 in float64 with norms from 0.4 to 4, at both teacher temperatures."""
    result = train([], norms=True, compare=True, fused=True) if fused else trained
    check_equations(result, ["log_center"])
    check_power(result)


def test_save_and_restore(train, trained, tmp_path):
    """Stopped after one epoch and resumed, every number is that of the run that was not stopped."""
    first = train([], norms=True, epochs=1, folder=tmp_path)
    file = tmp_path / "checkpoint.pt"
    torch.save(first["checkpoint"], file)
    second = train([], first_epoch=1, resume=str(file))
    assert torch.equal(torch.stack(first["losses"] + second["losses"]), torch.stack(trained["losses"]))
    for part in ("student", "teacher", "state_of_loss"):
        torch.testing.assert_close(second[part], trained[part], rtol=0, atol=0)


@EVERY_MISTAKE
def test_wrong_use_raises(train, mistake):
    check_raises(train, mistake, [])
