"""facebookresearch/dinov2: its SSLMetaArch with the documented diff, on CPU without FSDP and xFormers."""

from functools import partial

import pytest
import torch

from upstream.checkouts import (
    MISTAKES,
    Mistake,
    Training,
    check_equations,
    check_goes_on,
    check_power,
    check_raises,
    check_same_training,
)

pytestmark = pytest.mark.slow
OTHER_HEAD = Mistake(
    r"dino_loss.attach\((.*)\)$", r"dino_loss.attach(\1, 'ibot_head')", "head that this loss is attached to"
)
CENTERS = ["dino_loss.log_center", "ibot_patch_loss.log_center"]


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Training:
    return Training("dinov2", "facebookresearch/dinov2", "train_dinov2.py", tmp_path_factory)


@pytest.mark.parametrize("sinkhorn", [False, True])
def test_at_norm_one_with_plain_centring_training_is_the_original_one(train, sinkhorn):
    """Four steps with DINOv2's losses, KoLeo, parameter groups and teacher update, under centring and Sinkhorn."""
    original = train([], diff=False, unit=True, sinkhorn=sinkhorn)
    got = train([], unit=True, sinkhorn=sinkhorn, center="logit", start_of=str(original["file"]))
    check_same_training(got, original)


@pytest.mark.parametrize("shared", [False, True])
def test_loss_and_gradients_are_those_of_the_equations(train, shared):
    """Eq. 6, 7 and 9 in float64 for [CLS] tokens and masked patches, with norms from 0.4 to 4 and one or two heads."""
    result = train([], norms=True, compare=True, shared=shared)
    check_equations(result, CENTERS)
    check_power(result)


def test_under_sinkhorn_the_student_follows_equation_6(train):
    """The targets are those of a teacher without log C_p."""
    result = train([], norms=True, compare=True, sinkhorn=True)
    assert len(result["errors"]) == 4
    assert max(max(e.values()) for e in result["errors"]) < 1e-5
    assert torch.stack(list(result["state_of_loss"].values())).eq(0).all()


@pytest.mark.parametrize("mistake", [*MISTAKES.values(), OTHER_HEAD], ids=[*MISTAKES, "the other head"])
def test_wrong_use_raises(train, mistake):
    check_raises(train, mistake, [])


@pytest.mark.parametrize("sinkhorn", [False, True])
def test_save_and_restore(train, sinkhorn, tmp_path):
    """Stopped after two steps, with updates of both centres pending, and resumed: the same run."""
    check_goes_on(partial(train, []), tmp_path / "checkpoint.pt", at=2, norms=True, sinkhorn=sinkhorn)
