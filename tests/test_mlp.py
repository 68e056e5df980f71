"""`projection_mlp`: DINO's layers, names and initial weights, and what each option changes."""

import pytest
import torch
from torch import nn

from dino_original import OriginalHead
from vmf_heads.mlp import projection_mlp


@pytest.mark.parametrize("use_bn", [False, True])
@pytest.mark.parametrize("nlayers", [1, 2, 3, 4])
def test_is_dinos_mlp(nlayers, use_bn):
    torch.manual_seed(7)
    original = OriginalHead(16, 20, use_bn=use_bn, nlayers=nlayers, hidden_dim=12, bottleneck_dim=8).mlp
    torch.manual_seed(7)
    mlp = projection_mlp(16, 12, 8, nlayers, norm=(lambda: nn.BatchNorm1d(12)) if use_bn else None)
    for ours, theirs in zip(mlp.modules(), original.modules(), strict=True):
        assert isinstance(ours, type(theirs))
    assert list(mlp.state_dict()) == list(original.state_dict())
    torch.testing.assert_close(dict(mlp.state_dict()), dict(original.state_dict()), rtol=0, atol=0)
    x = torch.randn(5, 16)
    torch.testing.assert_close(mlp(x), original(x), rtol=0, atol=0)


def test_weights_are_truncated_normal_and_biases_zero():
    torch.manual_seed(0)
    first, _, second = projection_mlp(300, 400, 100, 2)
    for layer in (first, second):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.02)
        assert layer.weight.mean().abs() < 1e-3
        assert layer.bias.eq(0).all()


@pytest.mark.parametrize(("hidden_bias", "out_bias"), [(True, False), (False, True), (False, False)])
def test_biases_are_optional(hidden_bias, out_bias):
    linear = [layer for layer in projection_mlp(4, 5, 6, 3, hidden_bias=hidden_bias, out_bias=out_bias)][::2]
    assert [layer.bias is not None for layer in linear] == [hidden_bias, hidden_bias, out_bias]
    only = projection_mlp(4, 5, 6, 1, hidden_bias=hidden_bias, out_bias=out_bias)
    assert (only.bias is not None) is out_bias


def test_every_hidden_layer_has_a_norm_and_an_activation_of_its_own():
    layers = list(projection_mlp(4, 5, 6, 3, norm=lambda: nn.LayerNorm(5), act=nn.ReLU))
    hidden = [nn.Linear, nn.LayerNorm, nn.ReLU]
    assert all(map(isinstance, layers, [*hidden, *hidden, nn.Linear]))
    assert len(layers) == 7
    assert layers[1] is not layers[4]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 5, 6), ValueError, r"`in_dim` \(=0\) must be an integer >= 1"),
        ((4, 0, 6), ValueError, r"`hidden_dim` \(=0\) must be an integer >= 1"),
        ((4, 5, 1), ValueError, r"must be an integer >= 2"),
        ((4, 5, 6, 0), ValueError, r"`nlayers` \(=0\) must be an integer >= 1"),
        ((4, 5.5, 6), TypeError, r"`hidden_dim` \(=5.5\) must be an integer >= 1"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        projection_mlp(*arguments)
