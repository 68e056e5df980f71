"""The last layers: DINO's names, its checkpoints in every flavour, gradients of the norms, half precision, shards."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from devices import DEVICES
from dino_original import OriginalHead
from gloo import run_on_ranks
from vmf_heads import HeadOutput
from vmf_heads._matmul import linear_float32, mm_float32
from vmf_heads.prototypes import LinearPrototypes, Prototypes, prototype_log_normalizer
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
    """Forward and backward against float64 of the rounded operands, in the product that CUDA autocast takes, too."""
    features = torch.randn(*shape, P).div(4).requires_grad_()
    weight = torch.randn(K, P).mul(3).to(dtype).requires_grad_()
    upstream = torch.randn(*shape, K)
    scores = linear_float32(features, weight)
    grad_features, grad_weight = torch.autograd.grad(scores, (features, weight), upstream)
    y, w, g = (x.detach().to(dtype).double() for x in (features, weight, upstream))
    assert scores.dtype == grad_features.dtype == torch.float32
    assert grad_weight.dtype == dtype  # as of every parameter
    tolerance = {"rtol": 1e-5, "atol": 1e-5, "check_dtype": False}
    torch.testing.assert_close(scores, y @ w.t(), **tolerance)
    torch.testing.assert_close(grad_features, g @ w, **tolerance)
    want = (g.reshape(-1, K).t() @ y.reshape(-1, P)).to(dtype)
    torch.testing.assert_close(grad_weight, want, rtol=torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("layer", [Prototypes, LinearPrototypes])
def test_scores_under_autocast(layer, exact, device):
    """Always float32; on CUDA of rounded operands unless `exact`, elsewhere never rounded."""
    prototypes, features = layer(P, K).to(device), torch.randn(6, P, device=device)
    with torch.autocast(device, torch.bfloat16):
        scores = prototypes(features, exact=exact)
        of_output = prototypes.with_features(features).scores(exact=exact)
    assert scores.dtype == torch.float32
    y, w = features.double(), prototypes.weight.double()
    if device == "cuda" and not exact:
        y, w = y.bfloat16().double(), w.bfloat16().double()
    torch.testing.assert_close(scores, (y @ w.t()).float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(of_output, scores, rtol=0, atol=0)


@pytest.mark.parametrize("wanted", ["features", "weight"])
def test_half_scores_skip_what_needs_no_gradient(wanted):
    features, weight = torch.randn(5, P), torch.randn(K, P).bfloat16()
    {"features": features, "weight": weight}[wanted].requires_grad_()
    products = []
    with pytest.MonkeyPatch.context() as patch:
        scores = linear_float32(features, weight)
        patch.setattr("vmf_heads._matmul.mm_float32", lambda a, b: products.append(a) or mm_float32(a, b))
        scores.sum().backward()
    assert len(products) == 1
    assert (features.grad is None, weight.grad is None) == (wanted == "weight", wanted == "features")


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


@pytest.mark.parametrize("layer", [Prototypes, LinearPrototypes])
def test_both_layers_agree_on_what_they_are(layer):
    """The interface that heads, losses and reports rely on."""
    prototypes = layer(P, K)
    with torch.no_grad():
        for parameter in prototypes.parameters():
            parameter.mul_(torch.linspace(-2, 3, K).unsqueeze(1))
    features = nn.functional.normalize(torch.randn(4, P), dim=1)
    w = prototypes.weight
    output = prototypes.with_features(features)
    torch.testing.assert_close(prototypes.norms, w.norm(dim=1))
    torch.testing.assert_close(output.norms, prototypes.norms, rtol=0, atol=0)
    torch.testing.assert_close(output.prototypes, w, rtol=0, atol=0)
    torch.testing.assert_close(output.scores(), features @ w.t())
    torch.testing.assert_close(prototypes(features), output.scores(), rtol=0, atol=0)
    torch.testing.assert_close(prototypes.gathered_norms(), prototypes.norms, rtol=0, atol=0)
    torch.testing.assert_close(prototypes.gathered(), w, rtol=0, atol=0)
    assert not prototypes.gathered_norms().requires_grad
    assert not prototypes.gathered().requires_grad
    assert (prototypes.dim, prototypes.num_prototypes, prototypes.norms_require_grad) == (P, K, True)


def test_frozen_norms_are_said_to_be_frozen():
    assert not Prototypes(P, K, freeze_norms=True).norms_require_grad
    assert not LinearPrototypes(P, K).requires_grad_(False).norms_require_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_of_half_precision_rows_do_not_overflow(dtype):
    """The squares of 300 add up to more than float16 can hold."""
    output = HeadOutput(torch.ones(1, P), torch.full((K, P), 300, dtype=dtype), None)
    torch.testing.assert_close(output.norms, torch.full((K,), 1200.0))
    layer = LinearPrototypes(P, K).to(dtype)
    layer.weight.data.fill_(300)
    torch.testing.assert_close(layer.gathered_norms(), torch.full((K,), 1200.0))


@pytest.mark.parametrize("scales", [None, torch.linspace(-1, 3, K)], ids=["prototypes", "scales"])
@pytest.mark.parametrize("shape", [(9,), (2, 3), (0,)], ids=str)
def test_the_sum_of_scores_needs_no_scores(shape, scales):
    output = HeadOutput(torch.randn(*shape, P).bfloat16(), torch.randn(K, P) * 3, scales)
    want = output._replace(features=output.features.float()).scores().reshape(-1, K).sum(dim=0)
    torch.testing.assert_close(output.score_sum(), want, rtol=1e-5, atol=1e-5)


def gathered_of_rank(rank: int) -> list[dict[str, torch.Tensor]]:
    results = []
    for layer in (Prototypes, LinearPrototypes):
        torch.manual_seed(1)
        prototypes = layer(P, K)
        with torch.no_grad():
            for parameter in prototypes.parameters():
                parameter.mul_(torch.linspace(-2, 3, K).unsqueeze(1))
        whole = {"norms": prototypes.norms.detach(), "weight": prototypes.weight.detach().clone()}
        fully_shard(prototypes, mesh=init_device_mesh("cpu", (2,)))
        sharded = {"norms": prototypes.gathered_norms(), "weight": prototypes.gathered()}
        results += [whole, sharded]
    return results


def test_outside_of_a_forward_the_shards_of_fsdp2_are_gathered():
    for whole, sharded, linear, linear_sharded in run_on_ranks(gathered_of_rank):
        torch.testing.assert_close(sharded, whole)
        torch.testing.assert_close(linear_sharded, linear)
        assert len(whole["norms"]) == K
