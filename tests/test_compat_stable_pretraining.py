"""compat.stable_pretraining: the originals at prototype norm 1, Eq. 6, 7 and 9 in float64 elsewhere, checkpoints."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vmf_reference
from gloo import run_on_ranks
from vmf_heads.compat.dinov2 import DINOLoss as SummedLoss
from vmf_heads.compat.stable_pretraining import DINOProjector, DINOv1Loss, DINOv2Loss, iBOTPatchLoss

K, P, BATCH = 24, 8, 5


def original_projector() -> nn.Sequential:
    """As stable-pretraining builds it, with the normalisation as a module without parameters."""
    normalize = nn.Identity()
    normalize.forward = lambda x: F.normalize(x, dim=-1)
    linear = [nn.Linear(16, 12), nn.Linear(12, 12), nn.Linear(12, P), nn.Linear(P, K, bias=False)]
    return nn.Sequential(linear[0], nn.GELU(), linear[1], nn.GELU(), linear[2], normalize, linear[3])


def heads(*, unit: bool = False) -> tuple[DINOProjector, DINOProjector]:
    """(student, teacher), whose prototypes have norm 1 or norms from 0.3 to 3."""
    pair = [DINOProjector(16, 12, P, K) for _ in range(2)]
    for head, lowest in zip(pair, (0.3, 0.5), strict=True):
        norms = torch.ones(K) if unit else torch.linspace(lowest, 3, K)
        head.last_layer.weight.data = F.normalize(head.last_layer.weight.data, dim=1) * norms[:, None]
    return pair[0], pair[1].requires_grad_(False)


def attached(pair: tuple[nn.Module, nn.Module], **options) -> DINOv1Loss:
    loss = DINOv1Loss(**options)
    loss.attach(*pair)
    return loss


def pairs_of_views(targets: Tensor, log_p: Tensor) -> Tensor:
    terms = [-(t * s).sum(dim=1).mean() for i, t in enumerate(targets) for j, s in enumerate(log_p) if i != j]
    return sum(terms) / len(terms)


def step(loss: DINOv1Loss, student: nn.Module, teacher: nn.Module, views: Tensor, temperature: float) -> Tensor:
    """One step in stable-pretraining's order: the teacher sees the first two views."""
    scores = teacher(views[:2])
    targets = loss.softmax_center_teacher(scores, teacher_temp=temperature)
    value = loss(student(views), targets)
    loss.update_center(scores)
    return value


def test_the_projector_takes_the_originals_checkpoint():
    """At norm 1 it is the original, inside another module, too."""
    original = original_projector()
    original[6].weight.data = F.normalize(original[6].weight.data, dim=1)
    outer = nn.ModuleDict({"student": DINOProjector(16, 12, P, K)})
    outer.load_state_dict({f"student.{name}": tensor for name, tensor in original.state_dict().items()}, strict=True)
    x = torch.randn(2, BATCH, 16)
    torch.testing.assert_close(outer["student"](x), original(x))
    assert [tuple(p.shape) for p in outer.parameters()] == [tuple(p.shape) for p in original.parameters()]
    again = DINOProjector(16, 12, P, K)
    again.load_state_dict(outer["student"].state_dict(), strict=True)


@pytest.mark.parametrize("views", [2, 4])
def test_at_norm_one_with_logit_centring_it_is_the_original(views):
    """Three steps: without a centre, with that of the first batch, with a moving one."""
    student, teacher = heads(unit=True)
    loss = attached((student, teacher), centering="logit", center_momentum=0.8)
    center: Tensor | None = None
    for temperature in (0.04, 0.055, 0.07):
        x = torch.randn(views, BATCH, 16)
        got = step(loss, student, teacher, x, temperature)
        scores = teacher(x[:2])
        targets = ((scores - (0 if center is None else center)) / temperature).softmax(dim=-1)
        torch.testing.assert_close(
            got, pairs_of_views(targets, (student(x) / 0.1).log_softmax(dim=-1)), rtol=1e-5, atol=0
        )
        mean = scores.mean(dim=(0, 1))
        center = mean if center is None else 0.8 * center + 0.2 * mean
    torch.testing.assert_close(loss.state_dict(), {"center": center[None]}, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("start", ["zeros", "first_batch"])
def test_equations_6_7_and_9_in_float64(start):
    student, teacher = heads()
    loss = attached((student, teacher), center_start=start)
    exact = [copy.deepcopy(head).double() for head in (student, teacher)]
    center = torch.zeros(K, dtype=torch.float64)
    for number, temperature in enumerate((0.04, 0.05, 0.07)):
        x = torch.randn(4, BATCH, 16)
        got = step(loss, student, teacher, x, temperature)
        raw = [F.normalize(head.mlp(x.double()), dim=-1) @ head.last_layer.weight.T for head in exact]
        norms = [head.last_layer.weight.norm(dim=1).detach() for head in exact]
        scores = raw[1][:2].flatten(0, 1).detach()
        targets = vmf_reference.teacher(scores, norms[1], P, temperature, center).unflatten(0, (2, BATCH))
        log_p = (raw[0] / 0.1 + vmf_reference.log_normalizer(norms[0] / 0.1, P)).log_softmax(dim=-1)
        torch.testing.assert_close(got.double(), pairs_of_views(targets, log_p), rtol=1e-5, atol=0)
        momentum = 0.0 if number == 0 and start == "first_batch" else 0.9
        inside = vmf_reference.log_normalizer(norms[1] / temperature, P)
        center = vmf_reference.next_center(center, scores, temperature, momentum, log_c=inside)
    torch.testing.assert_close(loss.state_dict()["log_center"].double(), center, rtol=1e-4, atol=1e-5)


def test_patches_meet_sinkhorn_knopp_and_equation_6():
    """The targets are those of raw scores: log C_p of the teacher cancels. No samples are counted."""
    student, teacher = heads()
    loss = DINOv2Loss(dino_loss_weight=0.5, ibot_loss_weight=2.0)
    loss.dino_loss.attach(student, teacher)
    loss.ibot_loss.attach(student, teacher)
    views, patches = torch.randn(2, BATCH, 16), torch.randn(7, 16)
    scores = teacher(views), teacher(patches)
    targets = (
        loss.dino_loss.sinkhorn_knopp_teacher(scores[0], 0.07, num_samples=2 * BATCH),
        loss.ibot_loss.sinkhorn_knopp_teacher(scores[1], 0.07),
    )
    for got, raw in zip(targets, scores, strict=True):
        q = (raw.double().flatten(0, -2) / 0.07).exp()
        for _ in range(3):
            q = q / q.sum(dim=0)
            q = q / q.sum(dim=1, keepdim=True)
        torch.testing.assert_close(got.double().flatten(0, -2), q, rtol=1e-4, atol=1e-6)
    logits = student(views), student(patches)
    log_p = [(x / 0.1).log_softmax(dim=-1) for x in logits]
    want = 0.5 * pairs_of_views(targets[0], log_p[0]) - 2 * (targets[1] * log_p[1]).sum(dim=1).mean()
    torch.testing.assert_close(loss(logits[0], targets[0], logits[1], targets[1]), want)
    torch.testing.assert_close(loss(logits[0], targets[0]), 0.5 * pairs_of_views(targets[0], log_p[0]))


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))])
def test_copies_are_not_attached(copy_of):
    loss = DINOv2Loss()
    for part in (loss.dino_loss, loss.ibot_loss):
        part.attach(*heads())
    copied = copy_of(loss)
    with pytest.raises(RuntimeError, match=r"call `attach\(student, teacher\)` once before the loss"):
        copied.ibot_loss(torch.zeros(2, K), torch.zeros(2, K))
    with pytest.raises(RuntimeError, match=r"call `attach\(student, teacher\)` once before the loss"):
        copied.dino_loss(torch.zeros(2, BATCH, K), torch.zeros(2, BATCH, K))


def test_what_a_fused_loss_is_given_and_in_which_order():
    student, teacher = heads()
    loss = DINOv2Loss(fused=True)
    loss.dino_loss.attach(student, teacher)
    loss.ibot_loss.attach(student, teacher)
    y = student(torch.randn(2, BATCH, 16))
    assert y.shape == (2, BATCH, P)
    with pytest.raises(RuntimeError, match="call `softmax_center_teacher` or `sinkhorn_knopp_teacher` before the loss"):
        loss.dino_loss(y, y.detach())
    with pytest.raises(RuntimeError, match="call `sinkhorn_knopp_teacher` before the loss"):
        loss.ibot_loss(y[0], y[0].detach())
    with pytest.raises(ValueError, match=r"`student_logits` \(of shape \(2, 5, 24\)\) must be \(\.\.\., 8\)"):
        loss.dino_loss(torch.zeros(2, BATCH, K), torch.zeros(2, BATCH, K))


def test_copies_of_a_fused_loss_leave_the_heads_behind():
    """What was read last names the teacher's head."""
    student, teacher = heads()
    loss = DINOv2Loss(fused=True)
    loss.dino_loss.attach(student, teacher)
    loss.ibot_loss.attach(student, teacher)
    loss.dino_loss.softmax_center_teacher(teacher(torch.randn(2, BATCH, 16)), 0.04)
    loss.ibot_loss.sinkhorn_knopp_teacher(teacher(torch.randn(7, 16)), 0.04)
    copied = copy.deepcopy(loss)
    for part in (copied.dino_loss, copied.ibot_loss):
        assert part.fused
        assert part._reading is None
        with pytest.raises(RuntimeError, match=r"call `attach\(student, teacher\)` once before the loss"):
            part.sinkhorn_knopp_teacher(torch.zeros(2, K), 0.04)


def test_a_checkpoint_without_a_centre_lets_it_start_anew():
    """As stable-pretraining's are, and as it does."""
    pair = heads()
    loss = attached(pair)
    step(loss, *pair, torch.randn(4, BATCH, 16), 0.04)
    module = nn.ModuleDict({"dino_loss": attached(heads())})
    module.load_state_dict({}, strict=True)
    assert not module["dino_loss"].centering.log_center.any()
    module.load_state_dict({f"dino_loss.{name}": tensor for name, tensor in loss.state_dict().items()}, strict=True)
    torch.testing.assert_close(module["dino_loss"].state_dict(), loss.state_dict(), rtol=0, atol=0)


def test_a_pending_update_of_the_centre_is_saved():
    pair = heads()
    loss = attached(pair)
    views = torch.randn(4, BATCH, 16)
    step(loss, *pair, views, 0.04)
    assert not loss.updated
    state = copy.deepcopy(loss).state_dict()
    loss.apply_center_update()
    torch.testing.assert_close(loss.state_dict(), state, rtol=0, atol=0)
    assert state["log_center"].any()


def pending_on_ranks(rank: int) -> int:
    """How many warnings the state dict gives before and after the update is finished."""
    pair = heads()
    loss = attached(pair)
    step(loss, *pair, torch.randn(4, BATCH, 16), 0.04)
    with pytest.warns(UserWarning, match=r"call `apply_center_update\(\)` on every rank before you save") as caught:
        loss.state_dict()
    loss.apply_center_update()
    loss.state_dict()
    return len(caught)


def test_a_pending_update_of_several_ranks_is_said_to_be_lost():
    assert run_on_ranks(pending_on_ranks) == [1, 1]


def test_the_summed_loss_of_dinov2_refuses_the_call_of_this_one():
    """It would be eight times as large with two global and six local crops."""
    student, teacher = heads()
    loss = SummedLoss(K)
    loss.attach(student, teacher)
    views = torch.randn(8, BATCH, 16)
    targets = loss.softmax_center_teacher(teacher(views[:2]), 0.04)
    with pytest.raises(TypeError, match=r"`student_output_list` .* sequence .*stable_pretraining.DINOv1Loss"):
        loss(student(views), targets)


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ((4, BATCH, K), (2, BATCH + 1, K), r"must be \(S, B, K\) and \(T, B, K\)"),
        ((BATCH, K), (BATCH, K), r"must be \(S, B, K\) and \(T, B, K\)"),
        ((1, BATCH, K), (1, BATCH, K), "must hold two different views"),
        ((2, BATCH, 3), (2, BATCH, 3), r"`student_logits` \(of shape .*\) must be \(..., 24\)"),
    ],
)
def test_bad_shapes(student, teacher, message):
    with pytest.raises(ValueError, match=message):
        attached(heads())(torch.zeros(student), torch.zeros(teacher))


def test_patches_must_have_targets():
    loss = iBOTPatchLoss()
    loss.attach(*heads())
    with pytest.raises(ValueError, match=r"`student_patch_logits` \(of shape \(2, 24\)\) must have the shape of"):
        loss(torch.zeros(2, K), torch.zeros(3, K))
