"""The norms' own parameter group."""

import pytest
import torch
from torch import nn

from vmf_heads import VMFPrototypeHead
from vmf_heads.optim import separate_norms


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), VMFPrototypeHead(8, 16, hidden_dim=8, bottleneck_dim=4))


def test_every_parameter_is_in_one_group_and_the_norms_in_the_last() -> None:
    network = model()
    rest, norms = separate_norms(network.parameters(), network, lr=1e-3, lr_multiplier=20.0)
    assert norms["params"] == [network[1].last_layer.weight_g]
    assert norms["lr"] == pytest.approx(2e-2)
    assert norms["weight_decay"] == 0
    assert {id(x) for x in rest["params"] + norms["params"]} == {id(x) for x in network.parameters()}
    assert len(rest["params"]) + 1 == len(list(network.parameters()))


def test_dino_groups_keep_their_order_and_options() -> None:
    network = model()
    decayed = [x for x in network.parameters() if x.ndim > 1]
    plain = [x for x in network.parameters() if x.ndim == 1]
    groups = [{"params": decayed, "lr": 0.1}, {"params": plain, "weight_decay": 0.0}]
    first, second, norms = separate_norms(groups, network, lr=1e-3)
    assert len(first["params"]) == len(decayed) - 1
    assert second == {"params": plain, "weight_decay": 0.0}
    assert norms["lr"] == pytest.approx(1.0)
    assert (norms["lr_multiplier"], norms["wd_multiplier"]) == (10.0, 0.0), "what DINOv2's loop multiplies by"
    assert len(groups[0]["params"]) == len(decayed), "the caller's groups are left alone"


def test_a_group_may_be_a_single_parameter() -> None:
    network = model()
    groups = [{"params": parameter, "lr": 0.1} for parameter in network.parameters()]
    *rest, norms = separate_norms(groups, network, lr=1e-3)
    assert norms["params"][0] is network[1].last_layer.weight_g
    assert [len(group["params"]) for group in rest].count(0) == 1, "the group that held the norms"
    assert sum(len(group["params"]) for group in rest) == len(groups) - 1
    torch.optim.AdamW([*rest, norms]).step()


def test_adamw_moves_the_norms_faster_and_does_not_decay_them() -> None:
    network = model()
    layer = network[1].last_layer
    groups = separate_norms(network.parameters(), network, lr=1e-3, lr_multiplier=10.0)
    optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.5)
    network(torch.randn(32, 6)).square().sum().backward()
    before = layer.weight_g.detach().clone()
    optimizer.step()
    torch.testing.assert_close((layer.weight_g - before).abs(), torch.full_like(before, 1e-2), rtol=1e-3, atol=0)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    still = torch.optim.AdamW(separate_norms(network.parameters(), network, lr=1e-3), lr=1e-3, weight_decay=0.5)
    before, directions = layer.weight_g.detach().clone(), layer.weight_v.detach().clone()
    still.step()
    assert torch.equal(layer.weight_g, before)
    assert not torch.equal(layer.weight_v, directions)


def test_errors() -> None:
    network = model()
    with pytest.raises(ValueError, match=r"`module` .* must contain the prototypes"):
        separate_norms(network.parameters(), network[0], lr=1e-3)
    with pytest.raises(ValueError, match="`groups` must hold the norms"):
        separate_norms(network[0].parameters(), network, lr=1e-3)
    network[1].last_layer.weight_g.requires_grad_(False)
    with pytest.raises(ValueError, match="they must require grad"):
        separate_norms(network.parameters(), network, lr=1e-3)
    with pytest.raises(ValueError, match="`lr_multiplier`"):
        separate_norms(network.parameters(), network, lr=1e-3, lr_multiplier=0.0)
    with pytest.raises(ValueError, match="`lr`"):
        separate_norms(network.parameters(), network, lr=0.0)
