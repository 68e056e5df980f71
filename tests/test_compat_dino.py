"""compat.dino: DINO's own loss at prototype norm 1, Eq. 6, 7 and 9 in float64 elsewhere, the cells of Table 1."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import vmf_reference
from devices import DEVICES
from dino_models import BATCH, NCROPS, SCHEDULE, K, P, crops, dino_loss, models
from dino_original import OriginalHead, OriginalLoss
from vmf_heads.centering import LogitCentering
from vmf_heads.compat.dino import DINOHead, DINOLoss

BOTH = pytest.mark.parametrize("centering", ["logit", "probability"])
FUSED = pytest.mark.parametrize("fused", [False, True])


def step(loss, student, teacher, x: Tensor, epoch: int) -> tuple[Tensor, list[Tensor]]:
    """(loss, gradients) of one step on crops `x`."""
    value = loss(student(x), teacher(x[: 2 * len(x) // NCROPS]), epoch)
    parameters = [p for p in student.parameters() if p.requires_grad]
    return value.detach(), list(torch.autograd.grad(value, parameters))


@pytest.mark.filterwarnings("ignore:the student's prototype norms are frozen after:UserWarning")  # on purpose
@pytest.mark.parametrize("device", DEVICES)
@FUSED
@pytest.mark.parametrize("normalizer", ["vmf", "none"])
def test_at_norm_one_with_logit_centring_it_is_dinos_loss(normalizer, fused, device):
    """Loss, gradients (not of the norms, where log C_p has a slope) and centre over epochs with their own tau_t."""
    student, teacher = (m.to(device) for m in models(norms=False, normalizer=normalizer))
    originals = []
    for model in (student, teacher):
        original = copy.deepcopy(model)
        original.head = OriginalHead(16, K, hidden_dim=12, bottleneck_dim=P).to(device)
        original.head.load_state_dict(model.head.state_dict())
        originals.append(original)
    loss = dino_loss(centering="logit", center_momentum=0.8, fused=fused).to(device)
    loss.attach(student, teacher)
    original_loss = OriginalLoss(K, NCROPS, **SCHEDULE, center_momentum=0.8).to(device)
    student.head.last_layer.weight_g.requires_grad = False
    for epoch in (0, 1, 4):
        x = crops().to(device)
        (got, gradients), (want, expected) = (
            step(loss, student, teacher, x, epoch),
            step(original_loss, *originals, x, epoch),
        )
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(gradients, expected, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(loss.center, original_loss.center, rtol=1e-5, atol=1e-7)


def reference_step(student, teacher, x: Tensor, temperature: float, center: Tensor, normalizer: str) -> Tensor:
    """The loss from Eq. 6 and 7 as printed, pair by pair, in float64."""
    total, terms, bias = torch.zeros((), dtype=torch.float64), 0, normalizer == "vmf"
    views = x.chunk(NCROPS)
    for u in range(2):
        scores, norms = raw(teacher, views[u])
        target = (scores / temperature + bias * log_c(norms / temperature) - center).softmax(dim=1)
        for v in range(NCROPS):
            if v != u:
                scores, norms = raw(student, views[v])
                log_p = (scores / 0.1 + bias * log_c(norms / 0.1)).log_softmax(dim=1)
                total = total - (target * log_p).sum(dim=1).mean()
                terms += 1
    return total / terms


def raw(model, x: Tensor) -> tuple[Tensor, Tensor]:
    """(<w, y>, ||w||) written out."""
    layer = model.head.last_layer
    y = nn.functional.normalize(model.head.mlp(model.backbone(x)), dim=1)
    w = layer.weight_g * layer.weight_v / layer.weight_v.norm(dim=1, keepdim=True)
    return (y @ w.t()).detach(), w.norm(dim=1).detach()


def log_c(kappa: Tensor) -> Tensor:
    return vmf_reference.log_normalizer(kappa, P)


@BOTH
@FUSED
@pytest.mark.parametrize("normalizer", ["vmf", "none"])
def test_equations_6_to_9_in_float64(normalizer, fused, centering):
    """The centre of one epoch enters the next; the teacher head's own temperature plays no part."""
    student, teacher = models(normalizer=normalizer, temperature=0.3)
    loss = dino_loss(centering=centering, fused=fused)
    loss.attach(student, teacher)
    teacher.head.temperature = 123.0
    exact = [copy.deepcopy(m).double() for m in (student, teacher)]
    center = torch.zeros(K, dtype=torch.float64)
    for epoch, temperature in [(0, 0.04), (1, 0.055), (4, 0.07)]:
        x = crops()
        value, _ = step(loss, student, teacher, x, epoch)
        offset = center if centering == "probability" else center / temperature
        want = reference_step(*exact, x.double(), temperature, offset, normalizer)
        torch.testing.assert_close(value.double(), want, rtol=2e-5, atol=0)
        scores, norms = raw(exact[1], x[: 2 * BATCH].double())
        if centering == "probability":
            inside = log_c(norms / temperature) if normalizer == "vmf" else 0.0
            center = vmf_reference.next_center(center, scores, temperature, 0.9, log_c=inside)
            torch.testing.assert_close(loss.centering.log_center.double(), center, rtol=1e-4, atol=1e-5)
        else:
            bias = temperature * (log_c(norms / temperature) - log_c(torch.ones_like(norms) / temperature))
            logits = scores + (bias if normalizer == "vmf" else 0)
            center = 0.9 * center + 0.1 * logits.mean(dim=0)
            torch.testing.assert_close(loss.center[0].double(), center, rtol=1e-4, atol=1e-5)


@FUSED
def test_gradients_are_those_of_equation_6(fused):
    """The gradient of a float64 copy by finite differences along random directions, the norms included."""
    student, teacher = (m.double() for m in models())
    loss = dino_loss(
        center_momentum=1.0, fused=fused
    )  # a centre that stays, so that the loss is a function of the student
    loss.attach(student, teacher)
    x = crops().double()
    _, gradients = step(loss, student, teacher, x, 0)
    for parameter, gradient in zip(student.parameters(), gradients, strict=True):
        direction, start = torch.randn_like(parameter), parameter.detach().clone()
        values = []
        for offset in (1e-7, -1e-7):
            parameter.data = start + offset * direction
            values.append(reference_step(student, teacher, x, 0.04, torch.zeros(K), "vmf"))
        parameter.data = start
        difference = (values[0] - values[1]) / 2e-7
        torch.testing.assert_close((gradient * direction).sum(), difference, rtol=1e-4, atol=1e-7)


@BOTH
@pytest.mark.parametrize("normalization", ["none", "l2", "vmf"])
def test_the_cells_of_table_1(normalization, centering):
    """After some training: "none" and "vmf" move the norms, "l2" keeps them at 1; only "vmf" depends on log C_p."""
    options = {"normalizer": "vmf" if normalization == "vmf" else "none", "norm_last_layer": normalization == "l2"}
    student, teacher = models(norms=False, **options)
    loss = dino_loss(centering=centering)
    loss.attach(student, teacher)
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=1.0)
    for _ in range(3):
        x = crops()
        optimizer.zero_grad()
        loss(student(x), teacher(x[: 2 * BATCH]), 0).backward()
        optimizer.step()
    norms = student.head.last_layer.norms
    assert norms.eq(1).all().item() is (normalization == "l2")
    teacher.load_state_dict(student.state_dict())
    plain = OriginalHead(16, K, hidden_dim=12, bottleneck_dim=P)
    plain.load_state_dict(student.head.state_dict())
    same = torch.allclose(student(x), plain(student.backbone(x)), atol=1e-6)
    assert same is (normalization != "vmf")
    scores = teacher(x[: 2 * BATCH])
    log_c_p = log_c(norms.detach().double() / 0.04) if normalization == "vmf" else torch.zeros(K)
    offset = loss.centering.log_center if centering == "probability" else loss.center[0] / 0.04
    want = (scores.double() / 0.04 + log_c_p - offset).softmax(dim=1)
    torch.testing.assert_close(loss.targets(scores, 0).double(), want, rtol=1e-4, atol=1e-6)


@BOTH
@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))])
def test_copies_have_the_centre_and_are_not_attached(copy_of, centering):
    student, teacher = models()
    loss = dino_loss(centering=centering)
    loss.attach(student, teacher)
    step(loss, student, teacher, crops(), 0)
    other: DINOLoss = copy_of(loss)
    torch.testing.assert_close(other.state_dict(), loss.state_dict(), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match=r"call `attach\(student, teacher\)` once before the loss"):
        other(torch.zeros(NCROPS * BATCH, K), torch.zeros(2 * BATCH, K), 0)
    other.attach(student, teacher)
    x = crops()
    torch.testing.assert_close(step(other, student, teacher, x, 1)[0], step(loss, student, teacher, x, 1)[0])
    assert not any(isinstance(m, DINOHead) for m in loss.modules())


def test_a_logit_centre_without_rows_stays():
    centre = LogitCentering((1, 2), 0.9, None)
    centre.center.copy_(torch.tensor([[1.0, 2.0]]))
    centre.commit_()
    assert centre.center.tolist() == [[1.0, 2.0]]
