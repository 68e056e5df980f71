"""VMFPrototypeHead: DINO's own head at prototype norm 1, Eq. 6 elsewhere, and what a training script does to it."""

import copy
import pickle

import pytest
import torch
from torch import nn

import vmf_reference
from devices import DEVICES
from dino_original import OriginalHead
from vmf_heads import VMFPrototypeHead

SMALL = {"hidden_dim": 12, "bottleneck_dim": 8}
VARIANTS = [{"nlayers": n, "use_bn": bn} for n in (1, 2, 3, 4) for bn in (False, True)]


def small_head(**options) -> VMFPrototypeHead:
    """16 -> 20 prototypes with norms from 0.3 to 5."""
    head = VMFPrototypeHead(16, 20, **{**SMALL, **options})
    head.last_layer.weight_g.data = torch.linspace(0.3, 5, 20).unsqueeze(1)
    return head


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_is_dinos_head(variant, device):
    """Same seed, same initial weights; same names in the same order; same output; a strict load both ways."""
    torch.manual_seed(7)
    original = OriginalHead(16, 20, **SMALL, **variant)
    torch.manual_seed(7)
    head = VMFPrototypeHead(16, 20, **SMALL, **variant)
    pairs = zip(original.named_parameters(), head.named_parameters(), strict=True)
    for (name, want), (our_name, got) in pairs:
        assert our_name == name
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    original, head = original.to(device), head.to(device)
    x = torch.randn(9, 16, device=device)
    torch.testing.assert_close(head(x), original(x), rtol=0, atol=1e-6)

    trained = OriginalHead(16, 20, **SMALL, **variant).to(device).eval()
    head.load_state_dict(trained.state_dict(), strict=True)
    torch.testing.assert_close(head.eval()(x), trained(x), rtol=0, atol=1e-6)
    original.load_state_dict(head.state_dict(), strict=True)


@pytest.mark.parametrize(("normalizer", "frozen"), [("none", False), ("none", True), ("vmf", False)])
def test_normalizer_and_norm_last_layer(normalizer, frozen):
    head = small_head(normalizer=normalizer, norm_last_layer=frozen)
    assert head.last_layer.weight_g.requires_grad is not frozen
    original = OriginalHead(16, 20, **SMALL)
    original.load_state_dict(head.state_dict())
    x = torch.randn(4, 16)
    assert torch.allclose(head(x), original(x), atol=1e-6) is (normalizer == "none")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("temperature", [0.04, 0.07, 0.1])
def test_equation_6(temperature, device):
    """log P_s of the head's logits over tau against SciPy's Bessel function, float64, p = 256."""
    head = VMFPrototypeHead(16, 50, hidden_dim=32, temperature=temperature).double().to(device)
    norms = torch.linspace(0.3, 5, 50, dtype=torch.float64)
    head.last_layer.weight_g.data = norms.unsqueeze(1).clone().to(device)
    head.last_layer.weight_g.data[3] *= -1
    x = torch.randn(6, 16, dtype=torch.float64, device=device)
    got = (head(x) / temperature).log_softmax(dim=1)
    y = nn.functional.normalize(head.mlp(x), dim=1)
    scores = (y @ head.last_layer.weight.t()).detach().cpu()
    want = vmf_reference.log_student(scores, norms, 256, temperature)
    torch.testing.assert_close(got.detach().cpu(), want, rtol=0, atol=1e-9)
    single = (head.float()(x.float()) / temperature).log_softmax(dim=1)
    torch.testing.assert_close(single.detach().cpu().double(), want, rtol=0, atol=2e-4)


def test_gradient_reaches_the_norms_through_both_terms():
    head = small_head().double()
    x = torch.randn(5, 16, dtype=torch.float64)
    weight_g = head.last_layer.weight_g

    def loss(g: torch.Tensor) -> torch.Tensor:
        state = {"last_layer.weight_g": g}
        return (torch.func.functional_call(head, state, x) / 0.1).log_softmax(dim=1)[:, 3].sum()

    assert torch.autograd.gradcheck(loss, weight_g)


def test_outputs():
    head = small_head()
    x = torch.randn(3, 4, 16)
    logits = head(x)
    features, scores, all_three = (small_head(output=name) for name in ("features", "scores", "prototypes"))
    for other in (features, scores, all_three):
        other.load_state_dict(head.state_dict())
    y = features(x)
    torch.testing.assert_close(y.norm(dim=-1), torch.ones(3, 4))
    output = all_three(x)
    layer = head.last_layer
    torch.testing.assert_close(tuple(output), (y, layer.weight_v, layer.weight_g.squeeze(1)), rtol=0, atol=0)
    torch.testing.assert_close((output.prototypes, output.norms), (layer.weight, layer.norms), rtol=0, atol=0)
    raw = scores(x)
    torch.testing.assert_close(raw, y @ head.last_layer.weight.t())
    torch.testing.assert_close(output.scores(), raw, rtol=0, atol=0)
    added = (logits - raw).detach()
    log_c = head.temperature * head.log_normalizer(head.temperature)
    torch.testing.assert_close(added, log_c.detach().expand_as(added), rtol=0, atol=1e-5)
    torch.testing.assert_close(head(x[0, 0]), logits[0, 0])
    assert head(x[:0]).shape == (0, 4, 20)


def test_temperature_argument_overrides_the_heads_own():
    head = small_head(temperature=0.1)
    x = torch.randn(3, 16)
    default, sharp = head(x), head(x, temperature=0.04)
    assert not torch.allclose(default, sharp, atol=1e-2)
    head.temperature = 0.04
    torch.testing.assert_close(head(x), sharp, rtol=0, atol=0)
    assert not any("temperature" in name for name in head.state_dict())


def test_log_normalizer_is_a_function_of_the_norms():
    head = small_head()
    norms = torch.linspace(0.3, 5, 20)
    want = vmf_reference.log_normalizer(norms.double() / 0.04, 8)
    want -= vmf_reference.log_normalizer(torch.tensor([1 / 0.04]).double(), 8)
    torch.testing.assert_close(head.log_normalizer(0.04).detach(), want.float(), rtol=1e-5, atol=1e-5)
    given = head.log_normalizer(0.04, norms=norms.flip(0))
    torch.testing.assert_close(given, want.float().flip(0), rtol=1e-5, atol=1e-5)
    plain = small_head(normalizer="none")
    torch.testing.assert_close(plain.log_normalizer(0.04), torch.zeros(20), rtol=0, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_float32(dtype, device):
    head = small_head().to(device)
    x = torch.randn(6, 16, device=device)
    want = head(x)
    with torch.autocast(device, dtype):
        under_autocast = head(x)
    parameters_too = head.to(dtype)(x.to(dtype))
    for got in (under_autocast, parameters_too):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want, rtol=0, atol=0.2)
    assert (parameters_too - want).abs().max() > 0  # and not a float32 run in disguise


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_are_equal_independent_and_not_attached(copy_of):
    head = small_head()
    x = torch.randn(3, 16)
    logits = head(x)
    logits.sum().backward()  # DINO's weight_norm cannot be copied after this
    head.attach_output("scores")
    head(x)
    other = copy_of(head)
    torch.testing.assert_close(other(x), logits, rtol=0, atol=0)
    assert not other.is_attached
    assert head.is_attached
    other.last_layer.weight_g.data += 1
    head.release()
    torch.testing.assert_close(head(x), logits, rtol=0, atol=0)


@pytest.mark.parametrize("output", ["logits", "scores", "features"])
def test_compiles_into_one_graph(output):
    head = small_head(output=output)
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    for rows in (4, 6):
        x = torch.randn(rows, 16)
        torch.testing.assert_close(compiled(x), head(x))
        got, want = (torch.autograd.grad(f(x).square().sum(), list(head.mlp.parameters())) for f in (compiled, head))
        torch.testing.assert_close(got, want)


def test_the_head_runs_on_the_meta_device():
    with torch.device("meta"):
        head = VMFPrototypeHead(16, 32, hidden_dim=8, bottleneck_dim=8)
        logits = head(torch.randn(4, 16))
    assert logits.shape == (4, 32)
    assert logits.is_meta


def test_gradients_on_the_meta_device():
    with torch.device("meta"):
        head = VMFPrototypeHead(16, 32, hidden_dim=8, bottleneck_dim=8)
        logits = head(torch.randn(4, 16))
        own = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(8, 32))(torch.ones(1, 8))
    try:
        own.sum().backward()
    except NotImplementedError:
        pytest.skip(f"torch {torch.__version__} cannot differentiate its own weight norm on the meta device")
    logits.sum().backward()
    assert head.last_layer.weight_g.grad.is_meta
