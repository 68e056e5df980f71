import math

import pytest
import torch
from torch import nn

from config.recipe import load_recipe
from methods.registry import build_method
from training.optimization import clip_gradients, drop_last_layer_gradients, parameter_groups


def test_dinos_parameter_groups_cover_every_trained_parameter_once() -> None:
    student = build_method(load_recipe("photos_dino_vmf", {"hidden_size": 16, "out_dim": 8})).student
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    decayed, plain = ({names[id(p)] for p in group["params"]} for group in parameter_groups(student))
    assert decayed | plain == set(names.values())
    assert not decayed & plain
    assert {"head.last_layer.weight_g", "head.last_layer.weight_v"} <= decayed
    assert {"backbone.embeddings.cls_token", "backbone.embeddings.position_embeddings"} <= decayed  # 3-D, as in DINO
    assert plain == {name for name in names.values() if name.endswith(".bias") or ".layernorm" in f".{name}"}


def test_prototypes_need_not_decay() -> None:
    student = build_method(load_recipe("photos_dino_vmf", {"hidden_size": 16, "out_dim": 8})).student
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    of_dino, of_msn = (parameter_groups(student, decay_prototypes=decay)[0]["params"] for decay in (True, False))
    kept = {names[id(p)] for p in of_dino} - {names[id(p)] for p in of_msn}
    assert kept == {"head.last_layer.weight_g", "head.last_layer.weight_v"}


def test_norms_may_learn_faster_and_without_decay() -> None:
    student = build_method(load_recipe("photos_dino_vmf", {"hidden_size": 16, "out_dim": 8})).student
    together, apart = parameter_groups(student), parameter_groups(student, norms_lr_multiplier=10.0)
    norms = student.head.last_layer.weight_g
    assert [len(group["params"]) for group in apart] == [len(together[0]["params"]) - 1, len(together[1]["params"]), 1]
    assert apart[2]["params"][0] is norms
    assert (apart[2]["lr_multiplier"], apart[2]["wd_multiplier"]) == (10.0, 0.0)


def test_frozen_norms_need_no_group_of_their_own() -> None:
    student = build_method(load_recipe("photos_dino", {"normalization": "l2"})).student
    assert len(parameter_groups(student, norms_lr_multiplier=10.0)) == 2


def test_frozen_parameters_are_in_no_group() -> None:
    student = build_method(load_recipe("photos_dino", {"normalization": "l2"})).student
    trained = [parameter for group in parameter_groups(student) for parameter in group["params"]]
    assert all(parameter is not student.head.last_layer.weight_g for parameter in trained)


def network_with_gradients(*norms: float) -> nn.ParameterList:
    network = nn.ParameterList(torch.zeros(4) for _ in norms)
    for parameter, norm in zip(network, norms, strict=True):
        parameter.grad = torch.full((4,), norm / 2)
    return network


def test_each_parameter_is_clipped_on_its_own() -> None:
    network = network_with_gradients(3.0, 0.5, 4.0)
    network.append(torch.zeros(2))  # without a gradient, as the last layer's is when it is frozen
    total = clip_gradients(network, 1.0)
    assert total.item() == pytest.approx(math.sqrt(3.0**2 + 0.5**2 + 4.0**2))
    assert [network[i].grad.norm().item() for i in range(3)] == pytest.approx([1.0, 0.5, 1.0], rel=1e-5)


def test_zero_means_no_clipping() -> None:
    network = network_with_gradients(300.0)
    clip_gradients(network, 0.0)
    assert network[0].grad.norm().item() == pytest.approx(300.0)


def test_all_gradients_clipped_as_one() -> None:
    network = network_with_gradients(3.0, 4.0)
    assert clip_gradients(network, 1.0, over="network").item() == pytest.approx(5.0)
    assert [parameter.grad.norm().item() for parameter in network] == pytest.approx([0.6, 0.8], rel=1e-5)


def test_prototypes_are_no_part_of_the_network_that_is_clipped_as_one() -> None:
    # As in MSN, whose prototypes are beside the encoder: a large gradient of theirs must not shrink the encoder's.
    student = nn.ModuleDict({"mlp": nn.Linear(1, 1), "last_layer": nn.Linear(1, 1, bias=False)})
    for parameter, gradient in zip(student.parameters(), (3.0, 4.0, 12.0), strict=True):
        parameter.grad = torch.full_like(parameter, gradient)
    assert clip_gradients(student, 1.0, over="network").item() == pytest.approx(13.0)
    assert [parameter.grad.item() for parameter in student.parameters()] == pytest.approx([0.6, 0.8, 12.0], rel=1e-5)


def test_the_last_layer_stays_where_it_is_without_gradients() -> None:
    student = build_method(load_recipe("photos_dino_vmf", {"hidden_size": 16, "out_dim": 8})).student
    for parameter in student.parameters():
        parameter.grad = torch.ones_like(parameter)
    drop_last_layer_gradients(student)
    without = {name for name, parameter in student.named_parameters() if parameter.grad is None}
    assert without == {"head.last_layer.weight_g", "head.last_layer.weight_v"}
