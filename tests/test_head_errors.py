"""What VMFPrototypeHead refuses, and what it says; how a loss takes hold of a head and lets go of it."""

import pytest
import torch
from torch import nn

from vmf_heads import VMFPrototypeHead, set_temperature


def small_head(**options) -> VMFPrototypeHead:
    return VMFPrototypeHead(**{"in_dim": 16, "out_dim": 20, "hidden_dim": 12, "bottleneck_dim": 8, **options})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"in_dim": 0}, ValueError, r"`in_dim` \(=0\) must be an integer >= 1"),
        ({"out_dim": 0}, ValueError, r"`out_dim` \(=0\) must be an integer >= 1"),
        ({"out_dim": 3.5}, TypeError, r"`out_dim` \(=3.5\) must be an integer >= 1"),
        ({"nlayers": 0}, ValueError, r"`nlayers` \(=0\) must be an integer >= 1"),
        ({"hidden_dim": -1}, ValueError, r"`hidden_dim` \(=-1\) must be an integer >= 1"),
        ({"bottleneck_dim": 1}, ValueError, r"`bottleneck_dim` \(=1\) must be an integer >= 2"),
        ({"temperature": 0.0}, ValueError, r"`temperature` \(=0.0\) must be a finite number > 0"),
        ({"temperature": float("nan")}, ValueError, r"`temperature` \(=nan\) must be a finite number > 0"),
        ({"normalizer": "l2"}, ValueError, r"`normalizer` \(='l2'\) must be one of 'vmf', 'none'"),
        ({"output": "probs"}, ValueError, r"`output` \(='probs'\) must be one of 'logits', 'scores', 'features'"),
    ],
)
def test_constructor(options, error, message):
    with pytest.raises(error, match=message):
        small_head(**options)


@pytest.mark.parametrize("shape", [(3, 15), (16, 3), ()])
def test_input_of_another_width(shape):
    with pytest.raises(ValueError, match=r"`x` \(of shape .*\) must end in `in_dim` \(=16\)"):
        small_head()(torch.randn(shape))


@pytest.mark.parametrize("temperature", [0, -0.1, float("inf")])
def test_temperature(temperature):
    head = small_head()
    with pytest.raises(ValueError, match=r"`temperature` \(=.*\) must be a finite number > 0"):
        head(torch.randn(2, 16), temperature=temperature)
    with pytest.raises(ValueError, match=r"`temperature` \(=.*\) must be a finite number > 0"):
        set_temperature(head, temperature)
    assert head.temperature == 0.1


def test_set_temperature_without_a_head():
    with pytest.raises(ValueError, match=r"`module` \(a Linear\) must contain at least one prototype head"):
        set_temperature(nn.Linear(3, 3), 0.1)


def test_attach_output():
    head, x = small_head(), torch.randn(2, 16)
    logits = head(x)
    head.attach_output("features")
    head.attach_output("features")  # the same loss again
    assert head(x).shape == (2, 8)
    with pytest.raises(RuntimeError, match="already serves a loss as 'features' and cannot serve another as 'scores'"):
        head.attach_output("scores")
    with pytest.raises(ValueError, match=r"`output` \(='nothing'\) must be one of"):
        head.attach_output("nothing")
    head.release()
    torch.testing.assert_close(head(x), logits, rtol=0, atol=0)
    head.attach_output("scores")
    torch.testing.assert_close(head(x), head.last_layer(head.features(x)), rtol=0, atol=0)
    assert "(attached)" in repr(head)


def test_print_shows_what_matters():
    text = repr(small_head(temperature=0.04))
    assert "normalizer='vmf', temperature=0.04" in text
    assert "dim=8, num_prototypes=20" in text
    assert "attached" not in text


def test_a_temperature_that_is_no_number():
    with pytest.raises(TypeError, match=r"`temperature` \(='0.1'\) must be a finite number > 0"):
        VMFPrototypeHead(16, 32, temperature="0.1")
