"""compat.lightly: lightly's own head and loss at prototype norm 1, Eq. 6, 7 and 9 in float64 elsewhere, the guards."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import vmf_reference
from dino_original import OriginalHead
from vmf_heads import VMFPrototypeHead
from vmf_heads.compat.lightly import DINOLoss, DINOProjectionHead

K, P, BATCH = 24, 8, 5
SCHEDULE = {"warmup_teacher_temp": 0.04, "teacher_temp": 0.07, "warmup_teacher_temp_epochs": 3}
BOTH = pytest.mark.parametrize("centering", ["logit", "probability"])


def heads(*, norms: bool = True, **options) -> tuple[DINOProjectionHead, DINOProjectionHead]:
    """(student, teacher); prototype norms from 0.3 to 3 unless `norms` is False."""
    pair = [DINOProjectionHead(16, 12, P, K, **options) for _ in range(2)]
    for head, lowest in zip(pair, (0.3, 0.5), strict=True):
        if norms:
            head.last_layer.weight_g.data = torch.linspace(lowest, 3, K).unsqueeze(1)
    return pair[0], pair[1].requires_grad_(False)


def attached(student: nn.Module, teacher: nn.Module, **options) -> DINOLoss:
    loss = DINOLoss(K, **{**SCHEDULE, **options})
    loss.attach(student, teacher)
    return loss


def original_loss(teacher: list[Tensor], student: list[Tensor], center: Tensor, temperature: float) -> Tensor:
    """lightly's formula, pair by pair."""
    terms = [
        -(((t - center) / temperature).softmax(dim=1) * (s / 0.1).log_softmax(dim=1)).sum(dim=1).mean()
        for i, t in enumerate(teacher)
        for j, s in enumerate(student)
        if i != j
    ]
    return sum(terms) / len(terms)


@pytest.mark.parametrize(("teacher_views", "student_views"), [(2, 5), (2, 2), (1, 2), (3, 2)])
def test_at_norm_one_with_logit_centring_it_is_lightlys_loss(teacher_views, student_views):
    student, teacher = heads(norms=False)
    loss = attached(student, teacher, centering="logit", center_momentum=0.8)
    plain = [OriginalHead(16, K, hidden_dim=12, bottleneck_dim=P) for _ in range(2)]
    for original, head in zip(plain, (student, teacher), strict=True):
        original.load_state_dict({k.replace("layers.", "mlp."): v for k, v in head.state_dict().items()}, strict=True)
    center = torch.zeros(1, K)
    for call, temperature in [({"epoch": 1}, 0.055), ({"epoch": 3}, 0.07), ({}, 0.07), ({"teacher_temp": 0.05}, 0.05)]:
        views = torch.randn(max(teacher_views, student_views), BATCH, 16)
        got = loss([teacher(v) for v in views[:teacher_views]], [student(v) for v in views[:student_views]], **call)
        scores = [plain[1](v).detach() for v in views[:teacher_views]]
        want = original_loss(scores, [plain[0](v) for v in views[:student_views]], center, temperature)
        torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-6)
        names = [name for name, p in student.named_parameters() if p.requires_grad and name != "last_layer.weight_g"]
        gradients = torch.autograd.grad(got, [student.get_parameter(name) for name in names])
        expected = torch.autograd.grad(want, [plain[0].get_parameter(n.replace("layers", "mlp")) for n in names])
        torch.testing.assert_close(gradients, expected, rtol=1e-3, atol=1e-6)
        center = 0.8 * center + 0.2 * torch.cat(scores).mean(dim=0)
        torch.testing.assert_close(loss.center, center[None], rtol=1e-5, atol=1e-7)


def raw(head: DINOProjectionHead, x: Tensor) -> tuple[Tensor, Tensor]:
    """(<w, y>, ||w||) written out."""
    y = nn.functional.normalize(head.layers(x), dim=-1)
    w = head.last_layer.weight_g * head.last_layer.weight_v / head.last_layer.weight_v.norm(dim=1, keepdim=True)
    return (y @ w.t()).detach(), w.norm(dim=1).detach()


def log_c(kappa: Tensor) -> Tensor:
    return vmf_reference.log_normalizer(kappa, P)


@BOTH
@pytest.mark.parametrize("normalizer", ["vmf", "none"])
def test_equations_6_to_9_in_float64(normalizer, centering):
    """The centre of one step enters the next; the heads' own temperatures play no part."""
    student, teacher = heads(normalizer=normalizer, temperature=0.3)
    loss = attached(student, teacher, centering=centering)
    teacher.temperature = 123.0
    exact = [copy.deepcopy(head).double() for head in (student, teacher)]
    vmf = normalizer == "vmf"
    center = torch.zeros(K, dtype=torch.float64)
    for epoch, temperature in [(0, 0.04), (1, 0.055), (7, 0.07)]:
        views = torch.randn(4, BATCH, 16)
        got = loss([teacher(v) for v in views[:2]], [student(v) for v in views], epoch=epoch)
        scores, norms = raw(exact[1], views[:2].double())
        bias = vmf * (log_c(norms / temperature) - log_c(torch.ones_like(norms) / temperature))
        offset = center if centering == "probability" else center / temperature
        targets = (scores / temperature + bias - offset).softmax(dim=-1)
        predicted, norms = raw(exact[0], views.double())
        log_p = (predicted / 0.1 + vmf * log_c(norms / 0.1)).log_softmax(dim=-1)
        terms = [-(targets[t] * log_p[s]).sum(dim=1).mean() for t in range(2) for s in range(4) if s != t]
        torch.testing.assert_close(got.double(), sum(terms) / 6, rtol=2e-5, atol=0)
        rows = scores.flatten(0, 1)
        if centering == "probability":
            center = vmf_reference.next_center(center, rows, temperature, 0.9, log_c=bias)
            torch.testing.assert_close(loss.centering.log_center.double(), center, rtol=1e-4, atol=1e-5)
        else:
            center = 0.9 * center + 0.1 * (rows + temperature * bias).mean(dim=0)
            torch.testing.assert_close(loss.center[0, 0].double(), center, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            loss.targets(teacher(views[0]), epoch=epoch).sum(dim=1), torch.ones(BATCH), rtol=1e-5, atol=0
        )


@BOTH
@pytest.mark.parametrize("at_the_end", [False, True])
def test_accumulated_micro_batches_make_one_update(at_the_end, centering):
    student, teacher = heads()
    views = torch.randn(2, 6, 16)
    whole, parts = attached(student, teacher, centering=centering), attached(student, teacher, centering=centering)
    losses = []
    for i in range(3):
        micro = views[:, 2 * i : 2 * i + 2]
        now = i == 2 and not at_the_end
        losses.append(parts([teacher(v) for v in micro], [student(v) for v in micro], update_center=now))
    if at_the_end:
        parts.update_center()
    loss = whole([teacher(v) for v in views], [student(v) for v in views])
    torch.testing.assert_close(torch.stack(losses).mean(), loss)
    torch.testing.assert_close(parts.state_dict(), whole.state_dict(), rtol=1e-5, atol=1e-7)


def test_autocast_leaves_the_loss_in_float32():
    """Logits and scores of a head in bfloat16 are float32, and so is all that the loss does with them."""
    student, teacher = heads()
    views = torch.randn(3, BATCH, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = attached(student, teacher)
        scores, logits = [teacher(view) for view in views[:2]], [student(view) for view in views]
        got = loss(scores, logits)
    assert {x.dtype for x in [*scores, *logits]} == {torch.float32}
    with pytest.warns(UserWarning, match="head did not run between `attach` and the first call of the loss"):
        want = attached(student, teacher)(scores, logits)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_head_has_lightlys_parameters(batch_norm):
    """Names, order and shapes; with batch normalisation the hidden layers have no biases."""
    head = DINOProjectionHead(6, 5, 4, 3, batch_norm)
    hidden = (["weight"], ["weight", "bias"]) if batch_norm else (["weight", "bias"],)
    modules = [*hidden, *hidden, ["weight", "bias"]]
    indices = [0, 1, 3, 4, 6] if batch_norm else [0, 2, 4]
    names = [f"layers.{i}.{name}" for i, group in zip(indices, modules, strict=True) for name in group]
    assert [name for name, _ in head.named_parameters()] == [*names, "last_layer.weight_g", "last_layer.weight_v"]
    assert [name for name, _ in head.named_children()] == ["layers", "last_layer"]
    assert not [name for name in head.state_dict() if name.startswith("mlp")]
    assert head(torch.randn(4, 6)).shape == (4, 3)


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda head: pickle.loads(pickle.dumps(head))])
def test_copies_of_the_head_are_independent(copy_of):
    """update_momentum on a deep copy, as lightly's teachers are often made."""
    student, _ = heads()
    other, x = copy_of(student), torch.randn(2, 16)
    torch.testing.assert_close(other(x), student(x), rtol=0, atol=0)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    assert not torch.allclose(other(x), student(x))


def test_compiled_head_equals_eager():
    student, _ = heads()
    x = torch.randn(3, 16)
    torch.testing.assert_close(torch.compile(student, backend="eager", fullgraph=True)(x), student(x))


def test_gradients_of_the_prototypes_are_cancelled_in_the_first_epochs():
    head = DINOProjectionHead(6, 5, 4, 3, freeze_last_layer=2)
    for epoch, cancelled in [(0, True), (1, True), (2, False)]:
        head.zero_grad()
        head(torch.randn(4, 6)).sum().backward()
        head.cancel_last_layer_gradients(current_epoch=epoch)
        gradients = [head.last_layer.weight_g.grad, head.last_layer.weight_v.grad]
        assert [g is None for g in gradients] == [cancelled] * 2
        assert head.layers[0].weight.grad is not None


@BOTH
def test_state_dict_has_lightlys_name_and_shape(centering):
    student, teacher = heads()
    loss, resumed = (attached(*heads(), centering=centering) for _ in range(2))
    loss.attach(student, teacher)
    x = torch.randn(BATCH, 16)
    loss([teacher(x)], [student(x), student(x)])
    shapes = {name: tuple(tensor.shape) for name, tensor in loss.state_dict().items()}
    assert shapes == ({"log_center": (K,)} if centering == "probability" else {"center": (1, 1, K)})
    outer = nn.ModuleDict({"criterion": resumed})
    outer.load_state_dict({f"criterion.{name}": tensor for name, tensor in loss.state_dict().items()}, strict=True)
    torch.testing.assert_close(resumed.state_dict(), loss.state_dict(), rtol=0, atol=0)
    assert not any(isinstance(m, VMFPrototypeHead) for m in loss.modules())


def test_lightlys_own_centre_is_converted():
    center = torch.randn(1, 1, K) / 10
    student, teacher = heads(norms=False)
    loss = attached(student, teacher)
    loss.load_state_dict({"center": center}, strict=True)
    scores = teacher(torch.randn(BATCH, 16))
    targets = loss.targets(scores, teacher_temp=0.055)
    torch.testing.assert_close(targets, ((scores - center[0]) / 0.055).softmax(dim=1))
    with pytest.warns(UserWarning, match=r"a DINO logit `center` was loaded .* the teacher temperature 0.055"):
        loss.update_center(scores, teacher_temp=0.055)
    assert set(loss.state_dict()) == {"log_center"}


def test_a_vmf_centre_does_not_load_into_logit_centring():
    with pytest.raises(RuntimeError, match=r'(?s)Missing key.*"center".*Unexpected key.*"log_center"'):
        DINOLoss(K, centering="logit").load_state_dict({"log_center": torch.zeros(K)})


def test_frozen_norms_warn_and_the_default_leaves_them_free():
    assert DINOProjectionHead(6, 5, 4, 3).last_layer.weight_g.requires_grad
    with pytest.warns(UserWarning, match=r"the student's prototype norms are frozen \(norm_last_layer=True\)"):
        attached(*heads(norm_last_layer=True))


def test_order_of_calls():
    loss, (student, teacher) = DINOLoss(K), heads()
    views = [torch.zeros(BATCH, K)] * 2
    with pytest.raises(RuntimeError, match=r"call `attach\(student, teacher\)` once before the loss"):
        loss(views, views)
    loss.attach(nn.Sequential(student), nn.Sequential(teacher))
    with pytest.raises(RuntimeError, match=r"call `attach\(student, teacher\)` once before the loss"):
        copy.deepcopy(loss)(views, views)


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (nn.Linear(2, 2), heads()[1], r"`student` \(a Linear\) must contain exactly one prototype head"),
        (heads()[0], nn.Sequential(*heads()), r"`teacher` \(a Sequential\) must .* 2: pass `head=`, one of '0', '1'"),
        (heads()[0], heads(normalizer="none")[1], r"`normalizer` of the teacher's head \(='none'\) must be .*'vmf'"),
        (heads()[0], DINOProjectionHead(6, 5, 4, 3), r"`last_layer.num_prototypes` of the teacher.*=3.*24"),
    ],
)
def test_attach_refuses(student, teacher, message):
    with pytest.raises(ValueError, match=message):
        DINOLoss(K).attach(student, teacher)


def test_losses_that_share_a_head_must_agree():
    student, teacher = heads()
    attached(student, teacher)
    attached(student, teacher)
    with pytest.raises(RuntimeError, match=r"`student_temp` \(=0.2\) must be 0.1, which another loss"):
        attached(student, teacher, student_temp=0.2)
    with pytest.raises(ValueError, match="must have a head each: theirs is the same object"):
        attached(student, student)


GOOD = torch.zeros(BATCH, K)


@pytest.mark.parametrize(
    ("teacher_out", "student_out", "call", "message"),
    [
        ([GOOD], [GOOD], {}, r"`teacher_out` \(of 1 views\) and `student_out` \(of 1 views\) must hold two different"),
        ([], [GOOD], {}, r"`teacher_out` \(of 0 views\)"),
        ([GOOD[:, 1:]], [GOOD] * 2, {}, r"`teacher_out` \(of shape \(1, 5, 23\)\) must be \(..., 24\)"),
        ([GOOD], [GOOD[1:]] * 2, {}, r"`student_out` \(views of shape \(4, 24\)\) must have .* \(=\(5, 24\)\)"),
        ([GOOD], [GOOD] * 2, {"teacher_temp": 0}, r"`teacher_temp` \(=0\) must be a finite number > 0"),
        ([GOOD], [GOOD] * 2, {"epoch": -1}, r"`epoch` \(=-1\) must be an integer >= 0"),
    ],
)
def test_bad_inputs_change_nothing(teacher_out, student_out, call, message):
    student, teacher = heads()
    loss = attached(student, teacher)
    teacher(torch.randn(BATCH, 16))
    with pytest.raises(ValueError, match=message):
        loss(teacher_out, student_out, **call)
    assert loss.centering.log_center.eq(0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_dim": 0}, r"`output_dim` \(=0\) must be an integer >= 1"),
        ({"center_mode": "median"}, r"`center_mode` \(='median'\) must be one of 'mean'"),
        ({"student_temp": 0}, r"`student_temp` \(=0\) must be a finite number > 0"),
        ({"teacher_temp": -1}, r"`teacher_temp` \(=-1\) must be a finite number > 0"),
        ({"warmup_teacher_temp": 0}, r"`warmup_teacher_temp` \(=0\) must be a finite number > 0"),
        ({"warmup_teacher_temp_epochs": -1}, r"`warmup_teacher_temp_epochs` \(=-1\) must be an integer >= 0"),
        ({"centering": "sinkhorn"}, r"`centering` \(='sinkhorn'\) must be one of 'probability', 'logit'"),
        ({"center_momentum": 1.1}, r"`center_momentum` \(=1.1\) must be in \[0, 1\]"),
    ],
)
def test_constructor(options, message):
    with pytest.raises(ValueError, match=message):
        DINOLoss(**options)
