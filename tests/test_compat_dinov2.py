"""compat.dinov2: DINOv2's own losses at prototype norm 1, Eq. 6, 7 and 9 in float64 elsewhere, Sinkhorn-Knopp."""

import copy
import inspect
import itertools

import pytest
import torch
from torch import Tensor, nn

import vmf_reference
from dino_original import OriginalHead
from gloo import run_on_ranks
from vmf_heads import VMFPrototypeHead
from vmf_heads.compat.dinov2 import DINOHead, DINOLoss, iBOTPatchLoss

K, P, BATCH, PATCHES, CROPS = 24, 8, 5, 7, 3
LOSSES = pytest.mark.parametrize("cls", [DINOLoss, iBOTPatchLoss])
STEPS = [0.04, 0.055, 0.07]  # the teacher's temperatures


def heads(*, norms: bool = True, **options) -> tuple[DINOHead, DINOHead]:
    """(student, teacher); prototype norms from 0.3 to 3 unless `norms` is False."""
    pair = [DINOHead(16, K, hidden_dim=12, bottleneck_dim=P, **options) for _ in range(2)]
    for head, lowest in zip(pair, (0.3, 0.5), strict=True):
        if norms:
            head.last_layer.weight_g.data = torch.linspace(lowest, 3, K).unsqueeze(1)
    return pair[0], pair[1].requires_grad_(False)


def attached(cls, student: nn.Module, teacher: nn.Module, **options):
    loss = cls(K, **options)
    loss.attach(student, teacher)
    return loss


def masks() -> Tensor:
    """(BATCH, PATCHES) with 0 to 4 patches masked."""
    return torch.arange(PATCHES)[None] < torch.arange(BATCH)[:, None]


def tokens(cls) -> Tensor:
    """Backbone features as the teacher's head gets them: two crops' [CLS] tokens, or the masked patches."""
    return torch.randn(2 * BATCH if cls is DINOLoss else int(masks().sum()), 16)


def call(loss, logits: list[Tensor], targets: Tensor) -> Tensor:
    if isinstance(loss, DINOLoss):
        return loss(logits, targets.view(2, BATCH, K))
    return loss.forward_masked(logits[0], targets, masks())


def original(cls, log_p: list[Tensor], targets: Tensor) -> Tensor:
    """DINOv2's formulas, pair by pair or patch by patch, from log P_s."""
    if cls is DINOLoss:
        return sum(-(t * s).sum(dim=1).mean() for s in log_p for t in targets.view(2, BATCH, K))
    total, row = 0, 0
    for image in masks():
        for _ in range(int(image.sum())):
            total = total - (targets[row] * log_p[0][row]).sum() / image.sum()
            row += 1
    return total / BATCH


def student_inputs(cls) -> list[Tensor]:
    return [torch.randn(BATCH, 16) for _ in range(CROPS)] if cls is DINOLoss else [tokens(cls)]


@LOSSES
@pytest.mark.parametrize("sinkhorn", [False, True])
def test_at_norm_one_with_plain_centring_it_is_dinov2s_loss(cls, sinkhorn):
    """Loss, gradients and centre of three steps; a batch enters the centre when the next targets are asked for."""
    student, teacher = heads(norms=False)
    loss = attached(cls, student, teacher, centering="logit", center_momentum=0.8)
    plain = [OriginalHead(16, K, hidden_dim=12, bottleneck_dim=P) for _ in range(2)]
    for ours, theirs in zip((student, teacher), plain, strict=True):
        theirs.load_state_dict(ours.state_dict(), strict=True)
    center, pending = torch.zeros(K), None
    for temperature in STEPS:
        x, crops = tokens(cls), student_inputs(cls)
        scores = plain[1](x).detach()
        if sinkhorn:
            targets = loss.sinkhorn_knopp_teacher(teacher(x), temperature)
            want_targets = original_sinkhorn(scores / temperature)
        else:
            targets = loss.softmax_center_teacher(teacher(x), teacher_temp=temperature)
            center = center if pending is None else 0.8 * center + 0.2 * pending
            want_targets = ((scores - center) / temperature).softmax(dim=1)
            loss.update_center(teacher(x) if cls is DINOLoss else teacher(x)[None])
            pending = scores.mean(dim=0)
        torch.testing.assert_close(targets, want_targets, rtol=1e-4, atol=1e-6)
        got = call(loss, [student(c) for c in crops], targets)
        want = original(cls, [(plain[0](c) / 0.1).log_softmax(dim=1) for c in crops], want_targets)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        names = [name for name, _ in student.named_parameters() if name != "last_layer.weight_g"]
        gradients = torch.autograd.grad(got, [student.get_parameter(name) for name in names])
        expected = torch.autograd.grad(want, [plain[0].get_parameter(name) for name in names])
        torch.testing.assert_close(gradients, expected, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(loss.center.flatten(), center, rtol=1e-5, atol=1e-7)


def original_sinkhorn(logits: Tensor) -> Tensor:
    q = logits.double().exp()
    for _ in range(3):
        q = q / q.sum(dim=0, keepdim=True)
        q = q / q.sum(dim=1, keepdim=True)
    return q.float()


def raw(head: DINOHead, x: Tensor) -> tuple[Tensor, Tensor]:
    """(<w, y>, ||w||) written out."""
    y = nn.functional.normalize(head.mlp(x), dim=-1)
    w = head.last_layer.weight_g * head.last_layer.weight_v / head.last_layer.weight_v.norm(dim=1, keepdim=True)
    return (y @ w.t()).detach(), w.norm(dim=1).detach()


@LOSSES
def test_equations_6_7_and_9_in_float64(cls):
    student, teacher = heads()
    loss = attached(cls, student, teacher)
    student64, teacher64 = (copy.deepcopy(head).double() for head in (student, teacher))
    teacher.temperature = 123.0  # plays no part
    center, following = torch.zeros(K, dtype=torch.float64), None
    for temperature in STEPS:
        x, crops = tokens(cls), student_inputs(cls)
        targets = loss.softmax_center_teacher(teacher(x), temperature)
        loss.update_center(teacher(x))
        center = center if following is None else following
        scores, norms = raw(teacher64, x.double())
        want_targets = vmf_reference.teacher(scores, norms, P, temperature, center)
        torch.testing.assert_close(targets.double(), want_targets, rtol=1e-4, atol=1e-6)
        log_c = vmf_reference.log_normalizer(norms / temperature, P)
        following = vmf_reference.next_center(center, scores, temperature, 0.9, log_c=log_c)
        torch.testing.assert_close(loss.centering.log_center.double(), center, rtol=1e-4, atol=1e-5)
        got = call(loss, [student(c) for c in crops], targets)
        log_p = [vmf_reference.log_student(*raw(student64, c.double()), P, 0.1) for c in crops]
        torch.testing.assert_close(got.double(), original(cls, log_p, want_targets), rtol=2e-5, atol=0)


@LOSSES
def test_scores_average_without_log_c(cls):
    """Eq. 9 as it is printed."""
    student, teacher = heads()
    loss = attached(cls, student, teacher, center_on="scores", center_momentum=0.0)
    x = tokens(cls)
    loss.softmax_center_teacher(teacher(x), 0.05)
    loss.update_center(teacher(x))
    loss.apply_center_update()
    scores, _ = raw(copy.deepcopy(teacher).double(), x.double())
    printed = vmf_reference.next_center(torch.zeros(K).double(), scores, 0.05, 0.0)
    torch.testing.assert_close(loss.centering.log_center.double(), printed, rtol=1e-4, atol=1e-4)


@LOSSES
def test_sinkhorn_ignores_log_c_and_does_not_overflow(cls):
    """Logits of a head that no loss is attached to have log C_p inside; scores do not: the same assignments."""
    student, teacher = heads()
    x = tokens(cls)
    with_log_c = teacher(x, temperature=0.1)
    loss = attached(cls, student, teacher)
    scores = teacher(x)
    assert not torch.allclose(with_log_c, scores, atol=1e-2)
    assignments = loss.sinkhorn_knopp_teacher(scores, teacher_temp=0.07)
    torch.testing.assert_close(loss.sinkhorn_knopp_teacher(with_log_c, teacher_temp=0.07), assignments)
    torch.testing.assert_close(assignments, original_sinkhorn(scores / 0.07), rtol=1e-4, atol=1e-6)
    huge = scores * 100  # exp(huge / 0.04) is inf
    assert huge.max() / 0.04 > 89
    assert loss.sinkhorn_knopp_teacher(huge, 0.04).isfinite().all()
    torch.testing.assert_close(loss.sinkhorn_knopp_teacher(huge.half(), 0.04).sum(dim=1), torch.ones(len(x)))


def test_number_of_masked_patches_is_accepted_and_left_alone():
    """The original all-reduces it in place, which fails without torch.distributed."""
    student, teacher = heads()
    loss, x, n = attached(iBOTPatchLoss, student, teacher), tokens(iBOTPatchLoss), torch.tensor([10])
    got = loss.sinkhorn_knopp_teacher(teacher(x), teacher_temp=0.07, n_masked_patches_tensor=n)
    torch.testing.assert_close(got, loss.sinkhorn_knopp_teacher(teacher(x), 0.07), rtol=0, atol=0)
    assert n.item() == 10


def test_forward_of_all_patches_equals_the_masked_form():
    student, teacher = heads()
    loss, x = attached(iBOTPatchLoss, student, teacher), torch.randn(BATCH, PATCHES, 16)
    targets, mask = loss.softmax_center_teacher(teacher(x), 0.05), masks()
    want = loss.forward_masked(student(x)[mask], targets[mask], mask)
    torch.testing.assert_close(loss(student(x), targets, mask), want)
    padded = torch.cat([student(x)[mask], torch.randn(3, K)]), torch.cat([targets[mask], torch.zeros(3, K)])
    weights = (1 / mask.sum(dim=1, keepdim=True).clamp(min=1)).expand_as(mask)[mask]
    got = loss.forward_masked(*padded, mask, n_masked_patches=len(weights), masks_weight=weights)
    torch.testing.assert_close(got, want)


def architecture(shared: bool) -> tuple[nn.ModuleDict, nn.ModuleDict]:
    """The student and the teacher as DINOv2 holds them."""
    pairs = [heads()] if shared else [heads(), heads()]
    names = ["dino_head", "ibot_head"][: len(pairs)]
    return tuple(
        nn.ModuleDict({"backbone": nn.Linear(2, 2)} | {n: pair[i] for n, pair in zip(names, pairs, strict=True)})
        for i in range(2)
    )


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_two_losses_in_one_model(shared, named):
    """Separate heads, or one for both: each loss finds its own, by name or by itself, also inside a wrapper."""
    student, teacher = architecture(shared)
    dino, ibot = DINOLoss(K), iBOTPatchLoss(K)
    name = "dino_head" if shared else "ibot_head"
    dino.attach(nn.Sequential(student), teacher, head="dino_head" if named else None)
    ibot.attach(student, nn.Sequential(teacher), head=name if named else None)
    x = torch.randn(4, 16)
    assert dino.teacher.heads[0] is student["dino_head"]
    assert ibot.teacher.heads[0] is student[name]
    targets = ibot.softmax_center_teacher(teacher[name](x), 0.05)
    assert targets.shape == (4, K)
    with pytest.raises(ValueError, match=r"`head` \(='koleo'\) must be the name of a submodule of `student`"):
        dino.attach(student, teacher, head="koleo")
    if not shared:
        student["other"] = student.pop("dino_head")
        with pytest.raises(ValueError, match=r"2: pass `head=`, one of 'ibot_head', 'other'"):
            dino.attach(student, teacher)


@LOSSES
@pytest.mark.parametrize("centering", ["logit", "probability"])
def test_state_dict_has_dinov2s_name_and_shape(cls, centering):
    loss, resumed = (attached(cls, *heads(), centering=centering) for _ in range(2))
    teacher = loss.teacher.heads[1]
    x = tokens(cls)
    loss.softmax_center_teacher(teacher(x), 0.05)
    loss.update_center(teacher(x))
    loss.apply_center_update()
    center = (1, K) if cls is DINOLoss else (1, 1, K)
    assert {name: tuple(tensor.shape) for name, tensor in loss.state_dict().items()} == (
        {"log_center": (K,)} if centering == "probability" else {"center": center}
    )
    resumed.load_state_dict(loss.state_dict(), strict=True)
    torch.testing.assert_close(resumed.state_dict(), loss.state_dict(), rtol=0, atol=0)
    assert next(iter(loss.state_dict().values())).abs().sum() > 0
    assert not any(isinstance(m, VMFPrototypeHead) for m in loss.modules())


def test_dinov2s_own_centre_is_converted():
    center, (student, teacher) = torch.randn(1, 1, K) / 10, heads(norms=False)
    loss = attached(iBOTPatchLoss, student, teacher)
    loss.load_state_dict({"center": center}, strict=True)
    scores = teacher(tokens(iBOTPatchLoss))
    targets = loss.softmax_center_teacher(scores, 0.05)
    torch.testing.assert_close(targets, ((scores - center[0]) / 0.05).softmax(dim=1))
    with pytest.warns(UserWarning, match=r"a DINO logit `center` was loaded .* the teacher temperature 0.05"):
        loss.update_center(scores)
    loss.apply_center_update()
    mean = (scores / 0.05).softmax(dim=1).mean(dim=0).log()
    torch.testing.assert_close(loss.state_dict(), {"log_center": 0.9 * center[0, 0] / 0.05 + 0.1 * mean})


def test_head_has_dinov2s_signature_and_parameters():
    positional = [p.name for p in inspect.signature(DINOHead).parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD]
    assert positional == ["in_dim", "out_dim", "use_bn", "nlayers", "hidden_dim", "bottleneck_dim", "mlp_bias"]
    head = DINOHead(16, K, False, 2, 12, P, False)
    shapes = {name: tuple(p.shape) for name, p in head.named_parameters()}
    assert shapes == {
        "mlp.0.weight": (12, 16),
        "mlp.2.weight": (P, 12),
        "last_layer.weight_g": (K, 1),
        "last_layer.weight_v": (K, P),
    }
    assert head.last_layer.weight_g.requires_grad
    assert isinstance(DINOHead(16, K, nlayers=0, bottleneck_dim=P).mlp, nn.Linear)


def test_half_precision_parameters():
    """As FSDP's mixed precision hands them to the forward; zero rows pad the batch."""
    head = DINOHead(16, K, hidden_dim=12, bottleneck_dim=P).bfloat16()
    output = head(torch.cat([torch.randn(3, 16), torch.zeros(2, 16)]).bfloat16())
    assert output.dtype == torch.float32
    output[:3].sum().backward()
    assert all(p.grad.isfinite().all() for p in head.parameters())


@LOSSES
def test_autocast_leaves_targets_and_loss_in_float32(cls):
    student, teacher = heads()
    loss, x, crops = attached(cls, student, teacher), tokens(cls), student_inputs(cls)

    def targets_and_loss(scores: Tensor, logits: list[Tensor]) -> tuple[Tensor, ...]:
        targets = loss.softmax_center_teacher(scores, 0.05)
        return targets, call(loss, logits, targets), loss.sinkhorn_knopp_teacher(scores, 0.05)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores, logits = teacher(x), [student(c) for c in crops]
        got = targets_and_loss(scores, logits)
    torch.testing.assert_close(got, targets_and_loss(scores, logits), rtol=1e-6, atol=0)
    assert {t.dtype for t in got} == {torch.float32}


@LOSSES
def test_order_of_calls(cls):
    loss, (student, teacher) = cls(K), heads()
    logits = torch.zeros(10, K)
    for use in (lambda: loss.softmax_center_teacher(logits, 0.05), lambda: call(loss, [logits[:5]] * 2, logits)):
        if cls is iBOTPatchLoss:
            use = lambda: loss.forward_masked(logits, logits, masks())  # noqa: E731
        with pytest.raises(RuntimeError, match=r"call `attach\(student, teacher\)` once before the loss"):
            use()
    attached_loss = attached(cls, student, teacher)
    with pytest.raises(RuntimeError, match="call `softmax_center_teacher` before `update_center`"):
        attached_loss.update_center(teacher(tokens(cls)))


def test_bad_inputs():
    student, teacher = heads()
    dino, ibot = attached(DINOLoss, student, teacher), attached(iBOTPatchLoss, student, teacher)
    scores, logits = teacher(tokens(DINOLoss)), torch.zeros(BATCH, K)
    mask, patches = masks(), torch.zeros(int(masks().sum()), K)
    cases = [
        (lambda: dino.softmax_center_teacher(scores[:, 1:], 0.1), r"`teacher_output` \(of shape \(10, 23\)\) must be"),
        (lambda: dino.softmax_center_teacher(scores, 0), r"`teacher_temp` \(=0\) must be a finite number > 0"),
        (lambda: dino.sinkhorn_knopp_teacher(scores[:, 1:], 0.1), r"`teacher_output` \(of shape \(10, 23\)\) must be"),
        (lambda: dino.sinkhorn_knopp_teacher(scores, -1), r"`teacher_temp` \(=-1\) must be a finite number > 0"),
        (lambda: dino([logits[1:]], [logits]), r"`teacher_out_softmaxed_centered_list` .* `student_output_list`"),
        (lambda: dino([logits], []), r"`teacher_out_softmaxed_centered_list` \(of shapes \[\]\)"),
        (
            lambda: ibot.forward_masked(patches, patches[1:], mask),
            r"`teacher_patch_tokens_masked` \(of shape \(9, 24\)",
        ),
        (
            lambda: ibot.forward_masked(patches[1:], patches[1:], mask),
            r"`student_patch_tokens_masked` \(with 9 patches\)",
        ),
        (
            lambda: ibot(logits[None], logits[None], mask),
            r"`student_masks_flat` \(of shape \(5, 7\)\) must be \(B, N\)",
        ),
    ]
    for use, message in cases:
        with pytest.raises(ValueError, match=message):
            use()


@LOSSES
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"student_temp": 0}, r"`student_temp` \(=0\) must be a finite number > 0"),
        ({"center_momentum": -0.1}, r"`center_momentum` \(=-0.1\) must be in \[0, 1\]"),
        ({"centering": "sinkhorn"}, r"`centering` \(='sinkhorn'\) must be one of 'probability', 'logit'"),
    ],
)
def test_constructor(cls, options, message):
    with pytest.raises(ValueError, match=message):
        cls(K, **options)


RANKS = list(itertools.product(["DINOLoss", "iBOTPatchLoss"], ["logit", "probability"]))


def centres(rank: int) -> list[Tensor]:
    """The centre and the assignments of 10 rows, of which the first rank has 7; -1 has them all."""
    results = []
    for name, centering in RANKS:
        torch.manual_seed(4)
        student, teacher = heads()
        loss = attached(
            {"DINOLoss": DINOLoss, "iBOTPatchLoss": iBOTPatchLoss}[name], student, teacher, centering=centering
        )
        for temperature in STEPS:
            x = torch.randn(10, 16).tensor_split([10, 10] if rank < 0 else [7, 10])[max(rank, 0)]
            loss.softmax_center_teacher(teacher(x), temperature)
            loss.update_center(teacher(x))
        loss.apply_center_update()
        results += [next(iter(loss.state_dict().values())), loss.sinkhorn_knopp_teacher(teacher(x), 0.05)]
    return results


def test_unequal_ranks_have_the_centre_and_assignments_of_one_process():
    alone, ranks = centres(-1), run_on_ranks(centres)
    for i, want in enumerate(alone):
        assignments = i % 2
        got = torch.cat([r[i] for r in ranks]) if assignments else ranks[0][i]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
        if not assignments:
            torch.testing.assert_close(ranks[1][i], want, rtol=1e-4, atol=1e-6)
