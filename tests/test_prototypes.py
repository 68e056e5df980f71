"""The last layer: DINO's names, its checkpoints in every flavour, gradients of the norms, half precision."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from devices import DEVICES
from dino_original import OriginalHead
from vmf_heads._matmul import mm_float32
from vmf_heads._prototypes import Prototypes, _HalfScores, prototype_log_normalizer
from vmf_heads.special import vmf_mean_resultant

K, P = 7, 16


def parametrized(layer: nn.Linear) -> nn.Module:
    return nn.utils.parametrizations.weight_norm(layer)


def dino(layer: nn.Linear) -> nn.Module:
    stock = OriginalHead(3, K, hidden_dim=4, bottleneck_dim=P).last_layer
    stock.weight_g.data = layer.weight.data.norm(dim=1, keepdim=True)
    stock.weight_v.data = layer.weight.data * 3  # DINO's directions need not have norm 1
    return stock


@pytest.mark.parametrize("flavour", [dino, parametrized, lambda layer: layer], ids=["weight_norm", "new", "plain"])
def test_loads_every_flavour_of_last_layer(flavour):
    linear = nn.Linear(P, K, bias=False)
    linear.weight.data *= torch.linspace(0.3, 5, K).unsqueeze(1)
    features = torch.randn(4, P)
    want = features @ linear.weight.data.clone().t()
    prototypes = Prototypes(P, K)
    state = flavour(linear).state_dict()
    names = set(state)
    prototypes.load_state_dict(state, strict=True)
    assert set(state) == names  # the caller's dict is untouched
    torch.testing.assert_close(prototypes(features), want)
    torch.testing.assert_close(prototypes.norms, linear.weight.data.norm(dim=1))


def test_saves_dinos_names():
    prototypes = Prototypes(P, K)
    assert {name: tuple(tensor.shape) for name, tensor in prototypes.state_dict().items()} == {
        "weight_g": (K, 1),
        "weight_v": (K, P),
    }
    assert [name for name, _ in prototypes.named_parameters()] == ["weight_g", "weight_v"]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"weight_g": torch.ones(K, 1)}, 'Missing key.*"weight_v"'),
        ({"weight": torch.ones(K + 1, P)}, r"size mismatch for weight_v"),
        ({"weight": torch.ones(K, P), "bias": torch.ones(K)}, 'Unexpected key.*"bias"'),
    ],
)
def test_refuses_what_it_cannot_load(state, message):
    with pytest.raises(RuntimeError, match=message):
        Prototypes(P, K).load_state_dict(state)


def test_a_negative_norm_flips_the_direction_and_not_kappa():
    prototypes = Prototypes(P, K)
    features = torch.randn(4, P)
    scores = prototypes(features)
    prototypes.weight_g.data[2] = -2
    torch.testing.assert_close(prototypes.norms, torch.tensor([1.0, 1, 2, 1, 1, 1, 1]), rtol=0, atol=0)
    torch.testing.assert_close(prototypes(features)[:, 2], -2 * scores[:, 2])


@pytest.mark.parametrize("temperature", [0.04, 0.1])
def test_gradient_of_the_log_normalizer(temperature):
    """d log C_p(|g|/tau) / dg = -sign(g) A_p(|g|/tau) / tau, against a difference quotient, too."""
    norms = torch.tensor([0.3, 1.0, -2.0, 5.0])
    prototypes = Prototypes(256, 4).double()
    prototypes.weight_g.data = norms.double().unsqueeze(1)
    value = prototype_log_normalizer(prototypes.norms, 256, temperature)
    (gradient,) = torch.autograd.grad(value.sum(), prototypes.weight_g)
    g = prototypes.weight_g.detach().squeeze(1)
    want = -g.sign() * vmf_mean_resultant(g.abs() / temperature, 256) / temperature
    torch.testing.assert_close(gradient.squeeze(1), want, rtol=1e-12, atol=0)
    step = 1e-5
    up, down = (prototype_log_normalizer((g + s).abs(), 256, temperature) for s in (step, -step))
    torch.testing.assert_close(gradient.squeeze(1), (up - down) / (2 * step), rtol=1e-6, atol=0)


def test_prototypes_of_norm_one_have_log_normalizer_zero():
    assert prototype_log_normalizer(torch.ones(5), 256, 0.07).tolist() == [0] * 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(6,), (2, 3), (0,), ()])
def test_half_scores_round_the_operands_only(dtype, shape):
    """Forward and backward against float64 of the rounded operands; production uses it under CUDA autocast only."""
    features = torch.randn(*shape, P).div(4).requires_grad_()
    weight = torch.randn(K, P).mul(3).requires_grad_()
    upstream = torch.randn(*shape, K)
    scores = _HalfScores.apply(features, weight, dtype)
    grad_features, grad_weight = torch.autograd.grad(scores, (features, weight), upstream)
    y, w, g = (x.detach().to(dtype).double() for x in (features, weight, upstream))
    assert scores.dtype == grad_features.dtype == grad_weight.dtype == torch.float32
    tolerance = {"rtol": 1e-5, "atol": 1e-5, "check_dtype": False}
    torch.testing.assert_close(scores, y @ w.t(), **tolerance)
    torch.testing.assert_close(grad_features, g @ w, **tolerance)
    torch.testing.assert_close(grad_weight, g.reshape(-1, K).t() @ y.reshape(-1, P), **tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("exact", [False, True])
def test_scores_under_autocast(exact, device):
    """Always float32; on CUDA of rounded operands unless `exact`, elsewhere never rounded."""
    prototypes, features = Prototypes(P, K).to(device), torch.randn(6, P, device=device)
    with torch.autocast(device, torch.bfloat16):
        scores = prototypes(features, exact=exact)
    assert scores.dtype == torch.float32
    if device == "cuda" and not exact:
        want = _HalfScores.apply(features, prototypes.weight, torch.bfloat16)
    else:
        want = (features.double() @ prototypes.weight.double().t()).float()
    torch.testing.assert_close(scores, want, rtol=1e-5, atol=1e-5)


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket is torch.ops.aten.mm
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("wanted", [("features",), ("weight",), ("features", "weight")])
def test_half_scores_compute_no_gradient_that_nobody_needs(wanted):
    inputs = {"features": torch.randn(5, P), "weight": torch.randn(K, P)}
    for name in wanted:
        inputs[name].requires_grad_()
    scores = _HalfScores.apply(inputs["features"], inputs["weight"], torch.bfloat16)
    with Products() as products:
        scores.sum().backward()
    assert products.count == len(wanted)
    assert all((inputs[name].grad is not None) == (name in wanted) for name in inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_give_float32_scores(dtype):
    prototypes = Prototypes(P, K)
    prototypes.weight_g.data = torch.linspace(0.3, 5, K).unsqueeze(1)
    half = prototypes.to(dtype)
    features = torch.randn(4, P)
    scores = half(features.to(dtype))
    direction = half.weight_v.double()
    exact = direction / direction.norm(dim=1, keepdim=True) * half.weight_g.double()
    assert scores.dtype == half.norms.dtype == half.weight.dtype == torch.float32
    torch.testing.assert_close(scores, (features.to(dtype).double() @ exact.t()).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_half_products_stay_float32_under_autocast(dtype):
    a, b = torch.randn(3, 4).to(dtype), torch.randn(4, 5).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        product = mm_float32(a, b)
    assert product.dtype == torch.float32
    torch.testing.assert_close(product, a.float() @ b.float())


def test_a_plain_weight_keeps_its_norms_and_may_hold_a_zero_row():
    weight = torch.randn(5, 8, dtype=torch.bfloat16)
    weight[2] = 0
    prototypes = Prototypes(8, 5)
    prototypes.load_state_dict({"weight": weight})
    torch.testing.assert_close(prototypes.weight, weight.float())
