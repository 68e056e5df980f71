"""microsoft/esvit trains with the documented diff, on CPU in one gloo process, through its own `train_esvit`."""

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
SGD = ["--optimizer", "sgd", "--lr", "1"]
FUSED = pytest.mark.parametrize("fused", [False, True])


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Training:
    return Training("esvit", "microsoft/esvit", "train_esvit.py", tmp_path_factory)


@pytest.fixture(scope="module")
def dense(train: Training) -> dict[str, Any]:
    return train([*FROZEN, *SGD], diff=False, dense=True)


@pytest.fixture(scope="module")
def mixed(train: Training) -> dict[str, Any]:
    return train([*FROZEN, *SGD], diff=False, mixup=True)


@pytest.fixture(scope="module")
def trained(train: Training) -> dict[str, Any]:
    return train(FREE, norms=True, compare=True, dense=True)


@FUSED
def test_regions_at_norm_one_with_logit_centring_train_as_the_original(train, dense, fused):
    """Four steps over two epochs of views and regions, with EsViT's optimiser groups, frozen last layer and EMA."""
    got = train([*FROZEN, *SGD], loss={"centering": "logit", "fused": fused}, start_of=dense["file"], dense=True)
    check_same_training(got, dense)


@FUSED
def test_mixtures_at_norm_one_with_logit_centring_train_as_the_original(train, mixed, fused):
    """The same of views alone, whose images are mixed for the student."""
    got = train([*FROZEN, *SGD], loss={"centering": "logit", "fused": fused}, start_of=mixed["file"], mixup=True)
    check_same_training(got, mixed)


@FUSED
def test_loss_and_gradients_of_regions_are_those_of_the_equations(train, trained, fused):
    """Eq. 6, 7 and 9 in float64 for both heads, with norms from 0.4 to 4, at both teacher temperatures."""
    options = {"norms": True, "compare": True, "dense": True}
    result = train(FREE, loss={"fused": True}, **options) if fused else trained
    check_equations(result, ["log_center", "log_center_grid"])
    check_power(result)


@FUSED
def test_loss_and_gradients_of_mixtures_are_those_of_the_equations(train, fused):
    result = train(FREE, loss={"fused": fused}, norms=True, compare=True, mixup=True)
    check_equations(result, ["log_center"])
    check_power(result)


def test_save_and_restore(train, trained, tmp_path):
    """Stopped after one epoch and resumed, every number is that of the run that was not stopped."""
    first = train(FREE, folder=tmp_path, norms=True, stop_at=1, dense=True)
    second = train(FREE, folder=tmp_path, dense=True)
    assert torch.equal(torch.stack(first["losses"] + second["losses"]), torch.stack(trained["losses"]))
    for part in ("student", "teacher", "state_of_loss"):
        torch.testing.assert_close(second[part], trained[part], rtol=0, atol=0)


def test_a_checkpoint_of_plain_esvit_goes_on_with_vmf(train, dense, tmp_path):
    """At the first step the loss is what plain EsViT would have had; then the norms begin to move."""
    train([*FROZEN, *SGD], diff=False, folder=tmp_path, stop_at=1, dense=True)
    continued = train([*FREE, *SGD], folder=tmp_path, dense=True)
    torch.testing.assert_close(continued["losses"][0], dense["losses"][2], rtol=1e-5, atol=0)
    assert list(continued["state_of_loss"]) == ["log_center", "log_center_grid"]
    assert not continued["student"]["head_dense.last_layer.weight_g"].eq(1).all()


def test_the_loss_of_another_head_raises(train):
    """`DDINOLoss` attached to the heads in the wrong order is off by percents, and its gradients by more."""
    with pytest.raises(AssertionError, match="did not come from the teacher's head that this loss is attached to"):
        train(FREE, norms=True, dense=True, swap_heads=True)


@EVERY_MISTAKE
def test_wrong_use_raises(train, mistake):
    check_raises(train, mistake, FREE, dense=True)
