"""compat.dinov3: DINOv3's head at prototype norm 1, Eq. 6 in float64 elsewhere, and how DINOv3 builds and calls it."""

import copy
import inspect

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import vmf_reference
from gloo import run_on_ranks
from vmf_heads.compat.dino import DINOLoss
from vmf_heads.compat.dinov3 import DINOHead
from vmf_heads.special import vmf_mean_resultant

K, P = 24, 8


def head(*, norms: bool = True, **options) -> DINOHead:
    """Prototype norms from 0.3 to 3, or all 1."""
    result = DINOHead(16, K, hidden_dim=12, bottleneck_dim=P, **options)
    result.init_weights()
    weight = nn.functional.normalize(result.last_layer.weight.data, dim=1)
    result.last_layer.weight.data = weight * (torch.linspace(0.3, 3, K)[:, None] if norms else 1)
    return result


def plain(other: DINOHead, x: torch.Tensor) -> torch.Tensor:
    """DINOv3's own head."""
    return nn.functional.normalize(other.mlp(x), dim=-1) @ other.last_layer.weight.T


def test_at_norm_one_it_is_dinov3s_head():
    """Values and gradients, but those along the norms, where log C_p has a slope."""
    ours, x = head(norms=False), torch.randn(5, 16)
    torch.testing.assert_close(ours(x), plain(ours, x), rtol=1e-5, atol=1e-6)
    unit, probe = ours.last_layer.weight.detach(), torch.randn(5, K)
    gradients = torch.autograd.grad((ours(x) * probe).sum(), list(ours.parameters()))
    expected = torch.autograd.grad((plain(ours, x) * probe).sum(), list(ours.parameters()))
    torch.testing.assert_close(gradients[:-1], expected[:-1], rtol=1e-4, atol=1e-6)
    radial = (gradients[-1] - expected[-1]) @ unit.T
    difference = gradients[-1] - expected[-1] - radial.diagonal()[:, None] * unit
    torch.testing.assert_close(difference, torch.zeros_like(difference), rtol=0, atol=1e-5)
    slope = -vmf_mean_resultant(torch.full((K,), 10.0), P) * probe.sum(dim=0)
    torch.testing.assert_close(radial.diagonal(), slope, rtol=1e-4, atol=1e-5)


def test_equation_6_in_float64():
    ours, x = head(), torch.randn(5, 16)
    exact = copy.deepcopy(ours).double()
    scores = plain(exact, x.double()).detach()
    want = vmf_reference.log_student(scores, exact.last_layer.weight.detach().norm(dim=1), P, 0.1)
    torch.testing.assert_close((ours(x) / 0.1).log_softmax(dim=1).double(), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(head(normalizer="none")(x).shape, want.shape)
    none = head(normalizer="none")
    torch.testing.assert_close(none(x), plain(none, x))


def test_two_parts_are_the_whole():
    """As in multi-distillation, which communicates in between."""
    ours, x = head(), torch.randn(2, 3, 16)
    features = ours(x, no_last_layer=True)
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(2, 3))
    torch.testing.assert_close(ours(features, only_last_layer=True), ours(x), rtol=0, atol=0)
    assert ours(features, no_last_layer=True, only_last_layer=True) is features


def test_head_has_dinov3s_signature_and_parameters():
    positional = [p.name for p in inspect.signature(DINOHead).parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD]
    assert positional == ["in_dim", "out_dim", "use_bn", "nlayers", "hidden_dim", "bottleneck_dim", "mlp_bias"]
    shapes = {
        name: tuple(tensor.shape) for name, tensor in DINOHead(16, K, False, 2, 12, P, False).state_dict().items()
    }
    assert shapes == {"mlp.0.weight": (12, 16), "mlp.2.weight": (P, 12), "last_layer.weight": (K, P)}


def test_built_on_the_meta_device():
    """As DINOv3 does: to_empty leaves garbage, init_weights replaces all of it, and the temperature survives."""
    with torch.device("meta"):
        ours = DINOHead(64, 512, hidden_dim=64, bottleneck_dim=64)
    ours.to_empty(device="cpu")
    for parameter in ours.parameters():
        parameter.data.fill_(torch.nan)
    ours.init_weights()
    assert not list(ours.buffers())
    assert ours.temperature == 0.1
    for name, parameter in ours.named_parameters():
        assert parameter.eq(0).all() if name.endswith("bias") else 0.018 < parameter.std() < 0.022
    assert ours.last_layer.norms.mean().item() == pytest.approx(0.02 * 64**0.5, rel=0.05)
    assert ours(torch.randn(3, 64)).isfinite().all()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile does it itself
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_without_graph_breaks(dtype):
    ours, x = head().to(dtype), torch.randn(4, 16).to(dtype)
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), ours(x))


def test_half_precision_parameters():
    """As FSDP hands them to the forward: float32 logits, gradients in the parameters' dtype, near those of float32."""
    exact = head()
    ours = copy.deepcopy(exact).bfloat16()
    exact.load_state_dict(ours.state_dict())
    features = nn.functional.normalize(torch.randn(50, P), dim=1).bfloat16().float()
    outputs = [h(features, only_last_layer=True) for h in (ours, exact)]
    assert outputs[0].dtype == torch.float32
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    probe = torch.randn_like(outputs[0])
    got, want = (
        torch.autograd.grad((output * probe).sum(), each.last_layer.weight)[0]
        for output, each in zip(outputs, (ours, exact), strict=True)
    )
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).norm() < 0.01 * want.norm()


def test_norms_may_be_zero():
    ours = head()
    ours.last_layer.weight.data[0] = 0
    ours(torch.randn(3, 16)).sum().backward()
    assert all(p.grad.isfinite().all() for p in ours.parameters())


def test_attached_as_a_teacher_it_returns_scores():
    student, teacher = head(), head(temperature=0.7)
    loss = DINOLoss(K, 2, 0.04, 0.04, 0, 1)
    loss.attach(student, teacher)
    x = torch.randn(6, 16)
    torch.testing.assert_close(teacher(x), plain(teacher, x))
    assert loss(student(x), teacher(x), 0).isfinite()


@pytest.mark.parametrize("centering", ["probability", "logit"])
def test_the_fused_loss_takes_prototypes_without_weight_normalisation(centering):
    """Loss, gradients (those of the prototypes through their norms, too) and centre are those from the logits."""
    pair = head().double(), head().double().requires_grad_(False)
    crops = torch.randn(4 * 5, 16, dtype=torch.float64)
    results = []
    for fused in (False, True):
        student, teacher = copy.deepcopy(pair)
        loss = DINOLoss(K, 4, 0.04, 0.04, 0, 1, centering=centering, fused=fused).double()
        loss.attach(student, teacher)
        value = loss(student(crops), teacher(crops[: 2 * 5]), 0)
        gradients = torch.autograd.grad(value, list(student.parameters()))
        results.append((value.detach(), gradients, dict(loss.state_dict())))
    torch.testing.assert_close(results[1], results[0])
    unit = nn.functional.normalize(pair[0].last_layer.weight.detach(), dim=1)
    assert (results[1][1][-1] * unit).sum(dim=1).abs().min() > 0  # the norms have a gradient


def sharded_step(rank: int | None) -> list[dict[str, Tensor]]:
    """Unfused and fused: gradients and centre of a step on 6 images, or on this rank's 3 of them under FSDP2."""
    results = []
    for fused in (False, True):
        torch.manual_seed(5)
        student, teacher = head(), head()
        if rank is not None:
            for model in (student, teacher):
                # Where FSDP2 asks gloo for a mean, gloo of torch 2.8 gives a sum.
                fully_shard(model).set_force_sum_reduction_for_comms(True)
        loss = DINOLoss(K, 4, 0.04, 0.04, 0, 1, fused=fused)
        loss.attach(student, teacher)
        images = slice(None) if rank is None else slice(3 * rank, 3 * rank + 3)
        crops = torch.randn(4, 6, 16)[:, images].flatten(0, 1)
        loss(student(crops), teacher(crops[: len(crops) // 2]), 0).backward()
        results.append({name: whole(p.grad) for name, p in student.named_parameters()} | loss.state_dict())
    return results


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def test_sharded_heads_train_as_whole_ones():
    """Under FSDP2 the loss gathers the norms of the teacher's prototypes, K numbers, outside of its forward."""
    alone = sharded_step(None)
    for of_rank in run_on_ranks(sharded_step):
        torch.testing.assert_close(of_rank, alone, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("columns", "options", "name"), [(15, {}, "in_dim"), (16, {"only_last_layer": True}, "bottl")])
def test_bad_input(columns, options, name):
    with pytest.raises(ValueError, match=rf"`x` \(of shape \(2, {columns}\)\) must end in `{name}"):
        head()(torch.zeros(2, columns), **options)
