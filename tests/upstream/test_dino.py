"""facebookresearch/dino trains with the documented diff, on CPU in one gloo process, through its own `train_dino`."""

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
FROZEN, FREE = ["--norm_last_layer", "true"], ["--norm_last_layer", "false"]
# AdamW turns a gradient that is rounding noise into a step of full length.
SGD = ["--optimizer", "sgd", "--lr", "1"]
FUSED = pytest.mark.parametrize("fused", [False, True])


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Training:
    return Training("dino", "facebookresearch/dino", "train_dino.py", tmp_path_factory)


@pytest.fixture(scope="module")
def original(train: Training) -> dict[str, Any]:
    return train([*FROZEN, *SGD], diff=False)


@pytest.fixture(scope="module")
def trained(train: Training) -> dict[str, Any]:
    return train(FREE, norms=True, compare=True)


@FUSED
def test_at_norm_one_with_logit_centring_training_is_the_original_one(train, original, fused):
    """Four steps over two epochs with DINO's optimiser groups, clipping, frozen last layer and EMA."""
    got = train([*FROZEN, *SGD], loss={"centering": "logit", "fused": fused}, start_of=original["file"])
    check_same_training(got, original)


@FUSED
def test_loss_and_gradients_are_those_of_the_equations(train, trained, fused):
    """Eq. 6, 7 and 9 in float64 with norms from 0.4 to 4, at both teacher temperatures."""
    result = train(FREE, loss={"fused": True}, norms=True, compare=True) if fused else trained
    check_equations(result, ["log_center"])
    check_power(result)
    assert "head.last_layer.weight_g" in result["groups"][0], "DINO decays the norms"


def test_a_teacher_left_at_the_students_temperature_is_noticed(train):
    result = train(FREE, norms=True, compare=True, leave_temperature=True)
    with pytest.raises(AssertionError, match="'loss':"):
        check_equations(result, ["log_center"])


def test_save_and_restore(train, trained, tmp_path):
    """Stopped after one epoch and resumed, every number is that of the run that was not stopped."""
    first = train(FREE, folder=tmp_path, norms=True, stop_at=1)
    second = train(FREE, folder=tmp_path)
    assert torch.equal(torch.stack(first["losses"] + second["losses"]), torch.stack(trained["losses"]))
    for part in ("student", "teacher", "state_of_loss"):
        torch.testing.assert_close(second[part], trained[part], rtol=0, atol=0)


def test_a_checkpoint_of_plain_dino_goes_on_as_dino_vmf(train, original, tmp_path):
    """At the first step the loss is what plain DINO would have had; then the norms begin to move."""
    train([*FROZEN, *SGD], diff=False, folder=tmp_path, stop_at=1)
    continued = train([*FREE, *SGD], folder=tmp_path)
    torch.testing.assert_close(continued["losses"][0], original["losses"][2], rtol=1e-5, atol=0)
    assert list(continued["state_of_loss"]) == ["log_center"]
    assert not continued["student"]["head.last_layer.weight_g"].eq(1).all()


@EVERY_MISTAKE
def test_wrong_use_raises(train, mistake):
    check_raises(train, mistake, FREE)
