"""facebookresearch/dinov3: its losses on heads of the documented diff, on CPU with gloo."""

import pytest

from upstream.checkouts import Training

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("unit", [True, False], ids=["DINOv3's own head at norm 1", "Eq. 6 at norms from 0.4 to 4"])
def test_loss_and_gradients(unit, tmp_path_factory):
    """Four steps with DINOv3's construction on the meta device, losses, Sinkhorn-Knopp and parameter groups."""
    train = Training("dinov3", "facebookresearch/dinov3", "train_dinov3.py", tmp_path_factory)
    result = train([], unit=unit)
    assert len(result["errors"]) == 4
    for errors in result["errors"]:
        assert set(errors) == {"loss", "weight_v", "backbone and mlp"}
        assert max(errors.values()) < 1e-5
    assert result["last_layers"] == ["dino_head.last_layer.weight", "ibot_head.last_layer.weight"]
