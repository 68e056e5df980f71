"""facebookresearch/msn trains with the documented diff, on CPU, through its own src/msn_train.py."""

from typing import Any

import pytest
import torch

from upstream.checkouts import Mistake, Training, check_raises, check_same_training

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Training:
    return Training("msn", "facebookresearch/msn", "train_msn.py", tmp_path_factory)


@pytest.fixture(scope="module")
def trained(train: Training) -> dict[str, Any]:
    return train([], norms=True, compare=True)


def test_at_norm_one_training_is_the_original_one(train):
    """Four steps over two epochs with MSN's optimiser groups, clipping, schedules and EMA."""
    check_same_training(train([], unit=True), train([], diff=False, unit=True))


@pytest.mark.parametrize("sinkhorn", [False, True])
def test_loss_and_gradients_are_those_of_the_vmf_predictions(train, trained, sinkhorn):
    """In float64 with norms from 0.4 to 4; the norms learn under MSN's AdamW."""
    result = train([], norms=True, compare=True, sinkhorn=True) if sinkhorn else trained
    assert len(result["errors"]) == 4
    assert torch.tensor(result["errors"]).max() < 1e-5
    norms = result["state_of_loss"]["prototypes"].norm(dim=1)
    assert not torch.allclose(norms, torch.linspace(0.4, 4, len(norms)), atol=1e-4)


def test_save_and_restore(train, trained, tmp_path):
    """Stopped after one epoch and resumed, every number is that of the run that was not stopped."""
    first = train([], folder=tmp_path, norms=True, stop_at=1)
    second = train([], folder=tmp_path)
    assert torch.equal(torch.stack(first["losses"] + second["losses"]), torch.stack(trained["losses"]))
    for part in ("student", "teacher", "state_of_loss"):
        torch.testing.assert_close(second[part], trained[part], rtol=0, atol=0)


@pytest.mark.parametrize(
    "mistake",
    [
        Mistake("anchor_views=anchor_views", "anchor_views=target_views", r"`anchor_views` \(of 2 rows\) must have"),
        Mistake("=proto_labels", "=proto_labels[1:]", r"`proto_labels` \(of shape .* must have a row for each"),
    ],
    ids=["targets for anchors", "labels of other prototypes"],
)
def test_wrong_use_raises(train, mistake):
    """There is no `attach`: views and labels must fit each other and the prototypes."""
    check_raises(train, mistake, [])
