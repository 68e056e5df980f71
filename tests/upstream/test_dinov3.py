"""facebookresearch/dinov3: its losses on heads of the documented diff, on CPU with gloo."""

from functools import partial

import pytest

from upstream.checkouts import Training, check_goes_on

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Training:
    return Training("dinov3", "facebookresearch/dinov3", "train_dinov3.py", tmp_path_factory)


@pytest.mark.parametrize("unit", [True, False], ids=["DINOv3's own head at norm 1", "Eq. 6 at norms from 0.4 to 4"])
def test_loss_and_gradients(train, unit):
    """Four steps with DINOv3's construction on the meta device, losses, Sinkhorn-Knopp and parameter groups."""
    result = train([], unit=unit)
    assert len(result["errors"]) == 4
    for errors in result["errors"]:
        assert set(errors) == {"loss", "weight_v", "backbone and mlp"}
        assert max(errors.values()) < 1e-5
    assert result["last_layers"] == ["dino_head.last_layer.weight", "ibot_head.last_layer.weight"]


def test_save_and_restore(train, tmp_path):
    """Stopped after two steps and resumed, every number is that of the run that was not stopped."""
    check_goes_on(partial(train, []), tmp_path / "checkpoint.pt", at=2, unit=False)
