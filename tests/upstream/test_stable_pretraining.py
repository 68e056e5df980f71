"""galilai-group/stable-pretraining: its methods with the documented diffs, on a small backbone, without Lightning."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from upstream.checkouts import (
    EVERY_MISTAKE,
    LINEAR,
    Training,
    check_equations,
    check_power,
    check_raises,
    check_same_training,
)

pytestmark = pytest.mark.slow
METHODS = ("DINO", "iBOT", "DINOv2")
ALL = pytest.mark.parametrize("method", METHODS)
PLAIN_AND_FUSED = pytest.mark.parametrize("fused", [False, True])


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """Trains a method with its own diff, the one of this number in the section."""
    section = "galilai-group/stable-pretraining"
    training = Training("stable-pretraining", section, "train_stable_pretraining.py", tmp_path_factory)

    def run(method: str, **settings: Any) -> dict[str, Any]:
        number = METHODS.index(method)
        return training([], diffs=slice(number, number + 1), method=method, **settings)

    return run


@PLAIN_AND_FUSED
@ALL
def test_at_norm_one_with_logit_centring_training_is_the_original_one(train, method, fused):
    """Four steps over two epochs with stable-pretraining's masks, wrappers, EMA and late centre."""
    original = train(method, diff=False, unit=True)
    got = train(method, unit=True, centering="logit", fused=fused, start_of=str(original["file"]))
    if method == "DINOv2":  # Sinkhorn-Knopp: there is a centre here, and nothing moves it
        assert not got["state_of_loss"].pop("log_center").any()
    check_same_training(got, original)


@PLAIN_AND_FUSED
@ALL
def test_loss_and_gradients_are_those_of_the_equations(train, method, fused):
    """Eq. 6, 7 and 9 in float64 with norms from 0.4 to 4, at both teacher temperatures."""
    result = train(method, norms=True, compare=True, fused=fused)
    assert result["columns"] == (16 if fused else 48)  # of what the heads returned: features, or a logit per prototype
    check_equations(result, ["log_center"], prototypes=LINEAR)
    if method != "DINOv2":
        # The centre of one small batch is so uneven that it alone decides the targets that come after it.
        check_power({"errors_at_wrong_temperature": result["errors_at_wrong_temperature"][:1]})


@ALL
def test_save_and_restore(train, method, tmp_path):
    """Stopped after one epoch and resumed, an update of the centre pending where there is one: the same run."""
    whole = train(method, norms=True)
    first = train(method, norms=True, epochs=1)
    file = tmp_path / "checkpoint.pt"
    torch.save(first["checkpoint"], file)
    second = train(method, first_epoch=1, resume=str(file))
    assert torch.equal(torch.stack(first["losses"] + second["losses"]), torch.stack(whole["losses"]))
    for part in ("student", "teacher", "state_of_loss"):
        torch.testing.assert_close(second[part], whole[part], rtol=0, atol=0)


@EVERY_MISTAKE
@ALL
def test_wrong_use_raises(train, method, mistake):
    check_raises(train, mistake, method)
