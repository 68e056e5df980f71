"""compat.lightly's patch losses: lightly's own formula at prototype norm 1, Eq. 6, 7 and 9 in float64 elsewhere."""

import copy

import pytest
import torch
from torch import Tensor, nn

from upstream import equations
from vmf_heads.compat.lightly import DINOLoss, DINOv2ProjectionHead, IBOTPatchLoss, IBOTPlusPlusPatchLoss

K, P, BATCH, SIDE = 24, 8, 5, 3
BOTH = pytest.mark.parametrize("centering", ["logit", "probability"])
LOSSES = pytest.mark.parametrize("kind", [IBOTPatchLoss, IBOTPlusPlusPatchLoss])


class Heads(nn.Module):
    """What lightly's DINOv2 example holds its heads in."""

    def __init__(self, dino_head: nn.Module, ibot_head: nn.Module) -> None:
        super().__init__()
        self.dino_head, self.ibot_head = dino_head, ibot_head


def heads(*, norms: bool = True) -> tuple[DINOv2ProjectionHead, DINOv2ProjectionHead]:
    """(student, teacher); prototype norms from 0.3 to 3 unless `norms` is False."""
    pair = [DINOv2ProjectionHead(16, 12, P, K) for _ in range(2)]
    for head, lowest in zip(pair, (0.3, 0.5), strict=True):
        if norms:
            head.last_layer.weight_g.data = torch.linspace(lowest, 3, K).unsqueeze(1)
    return pair[0], pair[1].requires_grad_(False)


def attached(kind, student: nn.Module, teacher: nn.Module, **options):
    loss = kind(K, **options)
    loss.attach(student, teacher)
    return loss


def batch() -> tuple[Tensor, Tensor]:
    """Patches (5, 9, 16) of the backbone and a mask (5, 3, 3); one image has no masked patch, one only such."""
    mask = torch.rand(BATCH, SIDE, SIDE) < 0.4
    mask[0], mask[1] = False, True
    return torch.randn(BATCH, SIDE * SIDE, 16), mask


def of_loss(kind, loss, student, teacher, patches: Tensor, mask: Tensor, **call) -> Tensor:
    """The loss as it is called: iBOT's with the masked patches, iBOT++'s with all of them."""
    if kind is IBOTPatchLoss:
        patches = patches[mask.flatten(1)]
    return loss(teacher(patches), student(patches), mask, **call)


def expected(kind, entropy: Tensor, mask: Tensor, visible_loss_weight: float = 1.0) -> Tensor:
    """lightly's average of the cross-entropies (5, 9) of all patches, image by image."""
    total = torch.zeros((), dtype=entropy.dtype)
    for of_image, masked in zip(entropy, mask.flatten(1), strict=True):
        if masked.any():
            total = total + of_image[masked].mean() / BATCH
        if kind is IBOTPlusPlusPatchLoss and not masked.all():
            total = total + visible_loss_weight * of_image[~masked].mean() / BATCH
    return total


@LOSSES
def test_at_norm_one_with_logit_centring_it_is_lightlys_loss(kind):
    student, teacher = heads(norms=False)
    loss = attached(kind, student, teacher, centering="logit", center_momentum=0.8)
    center = torch.zeros(1, K)
    for call, temperature in [({}, 0.04), ({"teacher_temp": 0.07}, 0.07), ({"teacher_temp": 0.05}, 0.05)]:
        patches, mask = batch()
        got = of_loss(kind, loss, student, teacher, patches, mask, **call)
        scores, logits = (nn.functional.linear(unit(head, patches), prototypes(head)) for head in (teacher, student))
        entropy = -(((scores - center) / temperature).softmax(dim=-1) * (logits / 0.1).log_softmax(dim=-1)).sum(dim=-1)
        torch.testing.assert_close(got, expected(kind, entropy, mask), rtol=2e-6, atol=1e-6)
        rows = scores[mask.flatten(1)] if kind is IBOTPatchLoss else scores.flatten(0, 1)
        center = 0.8 * center + 0.2 * rows.mean(dim=0)
        torch.testing.assert_close(loss.center.value, center, rtol=1e-5, atol=1e-7)


def unit(head: nn.Module, x: Tensor) -> Tensor:
    return nn.functional.normalize(head.layers(x), dim=-1)


def prototypes(head: nn.Module) -> Tensor:
    return equations.prototypes(head.last_layer)[0].detach()


@LOSSES
def test_equations_6_7_and_9_in_float64(kind):
    """Loss and gradients; the centre of one step enters the next, and averages what the loss is given."""
    student, teacher = heads()
    loss = attached(kind, student, teacher)
    teacher.temperature = 123.0  # plays no part
    exact = [copy.deepcopy(head).double() for head in (student, teacher)]
    options = {"visible_loss_weight": 0.3} if kind is IBOTPlusPlusPatchLoss else {}
    center = torch.zeros(K, dtype=torch.float64)
    for temperature in (0.04, 0.055, 0.07):
        patches, mask = batch()
        got = of_loss(kind, loss, student, teacher, patches, mask, teacher_temp=temperature, **options)
        y = unit(exact[1], patches.double()).detach()
        targets = equations.teacher(y, exact[1].last_layer, temperature, center)
        log_p = equations.log_student(unit(exact[0], patches.double()), exact[0].last_layer, 0.1)
        want = expected(kind, -(targets * log_p).sum(dim=-1), mask, **options)
        torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=0)
        gradients = torch.autograd.grad(got, list(student.parameters()))
        for gradient, exact_gradient in zip(
            gradients, torch.autograd.grad(want, list(exact[0].parameters())), strict=True
        ):
            assert (gradient - exact_gradient).norm() < 1e-4 * exact_gradient.norm()
        rows = y[mask.flatten(1)] if kind is IBOTPatchLoss else y
        center = equations.next_center(rows, exact[1].last_layer, temperature, center)
        torch.testing.assert_close(loss.centering.log_center.double(), center, rtol=1e-4, atol=1e-5)


def test_ibot_plus_plus_in_its_other_shapes():
    """(B * N, K) with a mask (B, N); no mask: the mean over all patches; weight 0: iBOT's loss."""
    student, teacher = heads()
    patches, mask = batch()
    losses = {"center_momentum": 1.0, "centering": "logit"}
    loss, masked_loss = (attached(kind, student, teacher, **losses) for kind in (IBOTPlusPlusPatchLoss, IBOTPatchLoss))
    scores, logits = teacher(patches), student(patches)
    flat = loss(scores.flatten(0, 1), logits.flatten(0, 1), mask.flatten(1))
    torch.testing.assert_close(flat, loss(scores, logits, mask), rtol=1e-6, atol=0)
    entropy = -(loss._targets("scores", scores, 0.04) * (logits / 0.1).log_softmax(dim=-1)).sum(dim=-1)
    torch.testing.assert_close(loss(scores, logits), entropy.mean(), rtol=1e-6, atol=0)
    only_masked = masked_loss(scores[mask.flatten(1)], logits[mask.flatten(1)], mask)
    torch.testing.assert_close(loss(scores, logits, mask, visible_loss_weight=0), only_masked, rtol=1e-6, atol=0)


@BOTH
@LOSSES
@pytest.mark.parametrize("at_the_end", [None, "loss", "center"])
def test_accumulated_micro_batches_make_one_update(at_the_end, kind, centering):
    student, teacher = heads()
    whole, parts = (attached(kind, student, teacher, centering=centering) for _ in range(2))
    patches, mask = batch()
    for images, last in ((slice(0, 2), False), (slice(2, 5), True)):
        now = last and at_the_end is None
        of_loss(kind, parts, student, teacher, patches[images], mask[images], update_center=now)
    if at_the_end == "loss":
        parts.update_center()
    elif at_the_end == "center":
        parts.center.update()
    of_loss(kind, whole, student, teacher, patches, mask)
    torch.testing.assert_close(parts.state_dict(), whole.state_dict(), rtol=1e-5, atol=1e-7)


def test_a_batch_without_a_masked_patch():
    """Loss and gradients are 0, and the centre stays."""
    student, teacher = heads()
    loss = attached(IBOTPatchLoss, student, teacher)
    patches, mask = batch()
    value = of_loss(IBOTPatchLoss, loss, student, teacher, patches, torch.zeros_like(mask))
    assert value == 0
    assert all(not gradient.any() for gradient in torch.autograd.grad(value, list(student.parameters())))
    assert not loss.centering.log_center.any()


@pytest.mark.parametrize("shared", [False, True])
def test_both_losses_on_one_model(shared):
    """As in lightly's DINOv2 example, where by default the two names are those of one head."""
    (student, teacher), (student2, teacher2) = heads(), heads()
    models = [Heads(h, h if shared else h2) for h, h2 in ((student, student2), (teacher, teacher2))]
    dino, ibot = DINOLoss(K), IBOTPatchLoss(K)
    dino.attach(*models, head="dino_head")
    ibot.attach(*models, head="ibot_head")
    patches, mask = batch()
    views = torch.randn(2, BATCH, 16)
    of_dino = dino([models[1].dino_head(v) for v in views], [models[0].dino_head(v) for v in views])
    of_ibot = of_loss(IBOTPatchLoss, ibot, models[0].ibot_head, models[1].ibot_head, patches, mask)
    alone = attached(IBOTPatchLoss, models[0].ibot_head, models[1].ibot_head)
    torch.testing.assert_close(
        of_ibot, of_loss(IBOTPatchLoss, alone, models[0].ibot_head, models[1].ibot_head, patches, mask)
    )
    (of_dino + of_ibot).backward()
    assert models[0].ibot_head.last_layer.weight_g.grad.any()


@BOTH
def test_state_dict_has_lightlys_name_and_shape(centering):
    loss, resumed = (attached(IBOTPatchLoss, *heads(), centering=centering) for _ in range(2))
    student, teacher = heads()
    loss.attach(student, teacher)
    of_loss(IBOTPatchLoss, loss, student, teacher, *batch())
    shapes = {name: tuple(tensor.shape) for name, tensor in loss.state_dict().items()}
    assert shapes == ({"log_center": (K,)} if centering == "probability" else {"center.center": (1, K)})
    outer = nn.ModuleDict({"criterion": resumed})
    outer.load_state_dict({f"criterion.{name}": tensor for name, tensor in loss.state_dict().items()}, strict=True)
    torch.testing.assert_close(resumed.state_dict(), loss.state_dict(), rtol=0, atol=0)


def test_lightlys_own_centre_is_converted():
    student, teacher = heads(norms=False)
    loss = attached(IBOTPatchLoss, student, teacher)
    center = torch.randn(1, K) / 10
    loss.load_state_dict({"center.center": center}, strict=True)
    patches, mask = batch()
    with pytest.warns(UserWarning, match=r"a DINO logit `center` was loaded .* the teacher temperature 0.055"):
        got = of_loss(IBOTPatchLoss, loss, student, teacher, patches, mask, teacher_temp=0.055)
    scores, logits = (nn.functional.linear(unit(head, patches), prototypes(head)) for head in (teacher, student))
    entropy = -(((scores - center) / 0.055).softmax(dim=-1) * (logits / 0.1).log_softmax(dim=-1)).sum(dim=-1)
    torch.testing.assert_close(got, expected(IBOTPatchLoss, entropy, mask))


def test_a_vmf_centre_does_not_load_into_logit_centring():
    with pytest.raises(RuntimeError, match=r'(?s)Missing key.*"center.center".*Unexpected key.*"log_center"'):
        IBOTPatchLoss(K, centering="logit").load_state_dict({"log_center": torch.zeros(K)})


@pytest.mark.parametrize("batch_norm", [False, True])
def test_head_has_lightlys_parameters(batch_norm):
    head = DINOv2ProjectionHead(6, 5, 4, 3, batch_norm)
    names = [name for name, _ in head.named_parameters()]
    assert names[0] == "layers.0.weight"
    assert names[-2:] == ["last_layer.weight_g", "last_layer.weight_v"]
    assert ("layers.0.bias" in names) is not batch_norm
    assert head.last_layer.weight_g.requires_grad
    torch.testing.assert_close(head(torch.randn(4, 6)).shape, torch.Size([4, 3]))


@pytest.mark.filterwarnings("ignore:this head looks like a teacher")  # it is one that no loss is attached to
def test_order_of_calls():
    loss, (student, teacher) = IBOTPatchLoss(K), heads()
    patches, mask = batch()
    with pytest.raises(RuntimeError, match=r"call `attach\(student, teacher\)` once before the loss"):
        of_loss(IBOTPatchLoss, loss, student, teacher, patches, mask)
    with pytest.raises(ValueError, match=r"`head` \(='patch_head'\) must be the name of a submodule of `student`"):
        loss.attach(Heads(student, student), Heads(teacher, teacher), head="patch_head")


ROWS, MASK = torch.zeros(BATCH * 9, K), torch.ones(BATCH, 3, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (IBOTPatchLoss, (ROWS[1:], ROWS[1:], MASK), r"`mask` \(with 45 patches True\) must .* each of the 44 rows"),
        (IBOTPatchLoss, (ROWS, ROWS[1:], MASK), r"`student_out` \(of shape \(44, 24\)\) must have .* \(=\(45, 24\)\)"),
        (IBOTPatchLoss, (ROWS[:, 1:], ROWS[:, 1:], MASK), r"`teacher_out` \(of shape \(45, 23\)\) must be \(..., 24\)"),
        (IBOTPatchLoss, (ROWS[None], ROWS[None], MASK), r"`teacher_out` \(of shape .*\) must be \(N, 24\)"),
        (IBOTPatchLoss, (ROWS, ROWS, MASK.float()), r"`mask` \(of shape \(5, 3, 3\), torch.float32\) must be .* bool"),
        (IBOTPatchLoss, (ROWS, ROWS, MASK, 0), r"`teacher_temp` \(=0\) must be a finite number > 0"),
        (IBOTPlusPlusPatchLoss, (ROWS, ROWS), r"`teacher_out` .* must be \(B, N, 24\), or .* with a `mask`"),
        (IBOTPlusPlusPatchLoss, (ROWS, ROWS, MASK[1:]), r"`mask` .* one for each of the 45 patches"),
        (
            IBOTPlusPlusPatchLoss,
            (ROWS.view(9, 5, K), ROWS.view(9, 5, K), MASK),
            r"`mask` \(of 5 images\) must be of the 9 of",
        ),
    ],
)
def test_bad_inputs_change_nothing(kind, arguments, message):
    student, teacher = heads()
    loss = attached(kind, student, teacher)
    teacher(torch.randn(BATCH, 16))
    with pytest.raises(ValueError, match=message):
        loss(*arguments)
    assert loss.centering.log_center.eq(0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_dim": 0}, r"`output_dim` \(=0\) must be an integer >= 1"),
        ({"center_mode": "median"}, r"`center_mode` \(='median'\) must be one of 'mean'"),
        ({"teacher_temp": -1}, r"`teacher_temp` \(=-1\) must be a finite number > 0"),
        ({"centering": "sinkhorn"}, r"`centering` \(='sinkhorn'\) must be one of 'probability', 'logit'"),
        ({"center_momentum": 1.1}, r"`center_momentum` \(=1.1\) must be in \[0, 1\]"),
    ],
)
def test_constructor(options, message):
    with pytest.raises(ValueError, match=message):
        IBOTPatchLoss(**options)
