"""Numbers that no sound training has: norms from 1e-20 to 1e6, cold temperatures, voids, zeros, float16, a long run."""

import math
import os

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from cross_entropy_problems import gradients, reference
from dino_models import NCROPS, K, dino_loss, models
from dino_models import P as P_OF_MODELS
from vmf_heads import (
    HeadOutput,
    ProbabilityCentering,
    VMFPrototypeHead,
    log_vmf_normalizer,
    prototype_cross_entropy,
    prototype_report,
)

P, TOTAL, ROWS = 16, 40, 12


def random_case() -> tuple[Tensor, Tensor, Tensor]:
    """Features (ROWS, P), directions (TOTAL, P) and norms (TOTAL,) without any malice."""
    return normalize(torch.randn(ROWS, P), dim=1), torch.randn(TOTAL, P), torch.rand(TOTAL) * 2 + 0.1


def norms_of_all_sizes() -> tuple[Tensor, Tensor, Tensor]:
    y, v, _ = random_case()
    return y, v, torch.logspace(-20, 6, TOTAL)


def duplicates_and_opposites() -> tuple[Tensor, Tensor, Tensor]:
    y, v, g = random_case()
    return y, torch.cat([v[:10], v[:10], -v[:10], v[:1].expand(10, P)]), g


def void() -> tuple[Tensor, Tensor, Tensor]:
    """Features in a narrow cone, and all prototypes but one straight away from it."""
    y, _, g = random_case()
    y = normalize(torch.eye(P)[0] + 0.01 * y, dim=1)
    return y, torch.cat([torch.eye(P)[:1], -torch.eye(P)[:1].expand(TOTAL - 1, P)]), g * 20


def zero_features() -> tuple[Tensor, Tensor, Tensor]:
    y, v, g = random_case()
    return torch.where(torch.arange(ROWS)[:, None] % 2 == 0, 0, y), v, g


def all_rows_equal() -> tuple[Tensor, Tensor, Tensor]:
    y, v, g = random_case()
    return y[:1].expand(ROWS, P).clone(), v, g


def zero_norms() -> tuple[Tensor, Tensor, Tensor]:
    y, v, _ = random_case()
    return y, v, torch.zeros(TOTAL)


def tiny_directions() -> tuple[Tensor, Tensor, Tensor]:
    """Weight decay without a gradient: the length of v says nothing, until its square underflows."""
    y, v, g = random_case()
    return y, v * 1e-15, g


def without_scales() -> tuple[Tensor, Tensor, None]:
    """Prototypes whose squares leave float32 at the small end."""
    y, v, g = norms_of_all_sizes()
    return y, normalize(v, dim=1) * g[:, None], None


CASES = [
    without_scales,
    norms_of_all_sizes,
    duplicates_and_opposites,
    void,
    zero_features,
    all_rows_equal,
    zero_norms,
    tiny_directions,
]
CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)


@pytest.mark.parametrize("same_position", [False, True])
@pytest.mark.parametrize("temperature", [1e-3, 0.04, 10.0])
@CASE
def test_loss_and_gradients_in_float32_are_those_of_float64(case, temperature: float, same_position: bool) -> None:
    """Of the fused loss, to what float32 can hold of logits as large as norm / temperature (up to 1e9 here)."""
    y, v, g = case()
    student = HeadOutput(*(None if x is None else x.clone().requires_grad_() for x in (y, v, g)))
    teacher = HeadOutput(y.flip(0), v, g)
    arguments = {
        "student": student,
        "teacher": teacher,
        "student_temperature": temperature,
        "teacher_temperature": temperature,
        "log_center": torch.linspace(-5, 0, TOTAL),
        "teacher_rows": None if same_position else torch.arange(ROWS)[:, None],
        "weights": torch.full((ROWS, 1), 1 / ROWS),
    }
    loss, log_sum, _ = prototype_cross_entropy(**arguments)
    want, want_log_sum, _ = reference(arguments)
    got_gradients, want_gradients = gradients(loss, arguments), gradients(want, arguments)

    logits = float(student.norms.detach().max()) / temperature
    rounding = 8 * torch.finfo(torch.float32).eps * max(1, logits, 1 / temperature)  # 1 / temperature: log C_p
    assert loss.item() == pytest.approx(want.item(), abs=rounding + 1e-5 * abs(want.item()))
    torch.testing.assert_close(log_sum.double(), want_log_sum, rtol=1e-5, atol=rounding + 1e-5)
    for name, gradient in got_gradients.items():
        assert gradient.isfinite().all(), name
        if logits < 1e3:  # beyond, which of two nearly equal logits wins is rounding
            error = (gradient - want_gradients[name]).norm() / want_gradients[name].norm().clamp(min=1e-30)
            assert error < 1e-3 * max(1, logits / 50) or want_gradients[name].norm() < 1e-4, (name, error)


@pytest.mark.parametrize("case", CASES[1:], ids=lambda case: case.__name__)
def test_the_unfused_head_stays_finite(case) -> None:
    """Logits, softmax and gradients of the head at a temperature of 1e-3."""
    y, v, g = case()
    head = VMFPrototypeHead(P, TOTAL, nlayers=1, bottleneck_dim=P, temperature=1e-3)
    with torch.no_grad():
        head.last_layer.weight_v.copy_(v)
        head.last_layer.weight_g.copy_(v.norm(dim=1, keepdim=True) if g is None else g[:, None])
        head.mlp.weight.copy_(torch.eye(P))
    logits = head(y)
    assert logits.isfinite().all()
    (logits / 1e-3).log_softmax(dim=1)[:, 0].mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in head.parameters())


@CASE
def test_the_centre_stays_finite(case) -> None:
    y, v, g = case()
    centering = ProbabilityCentering(TOTAL)
    output = HeadOutput(y, v, g)
    for _ in range(200):
        centering.update_(output, 1e-3, log_normalizer=torch.linspace(-1e6, 1e6, TOTAL))
    assert centering.log_center.isfinite().all()
    assert centering.log_center.min() >= -709


@CASE
def test_the_report_has_an_answer(case) -> None:
    y, v, g = case()
    report = prototype_report(HeadOutput(y, v, g).prototypes, y, temperature=1e-3)
    assert all(map(math.isfinite, report.as_dict().values()))
    assert report.verdict


@pytest.mark.parametrize("fused", [False, True])
def test_float16_with_a_grad_scaler_skips_what_overflowed_and_recovers(fused: bool) -> None:
    """Features in float16 and a loss scale that overflows: the scaler halves it until the step is taken."""
    (student, teacher), loss = models(), dino_loss(fused=fused)
    loss.attach(student, teacher)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**26)
    before = student.head.last_layer.weight_g.detach().clone()
    taken, scales = 0, [2.0**26]
    for _ in range(60):
        x = torch.randn(NCROPS * 5, 10)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            value = loss(student(x), teacher(x[:10]), 0)
        assert value.isfinite()
        assert value.dtype == torch.float32
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        taken += scales[-1] >= scales[-2]
    assert scales[1] < scales[0]
    assert taken > 20
    assert all(parameter.isfinite().all() for parameter in student.parameters())
    assert not torch.equal(before, student.head.last_layer.weight_g)


@pytest.mark.slow
@pytest.mark.parametrize(("fused", "steps"), [(True, int(os.environ.get("TORTURE_STEPS", "2000"))), (False, 500)])
def test_many_steps_in_bfloat16_autocast(fused: bool, steps: int) -> None:
    """No NaN, and the centre is that of Eq. 9 in float64 from the same features: rounding does not become a drift."""
    (student, teacher), loss = models(), dino_loss(fused=fused)
    loss.attach(student, teacher)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, foreach=True)
    data = torch.randn(64, 10)
    exact, temperature, last_layer = torch.zeros(K).double(), 0.055, teacher.head.last_layer
    loss.teacher_temp_schedule[:] = temperature
    features = []
    teacher.head.last_layer.register_forward_pre_hook(lambda layer, arguments: features.append(arguments[0]))
    for _ in range(steps):
        x = data[torch.randint(64, (2,))].repeat(NCROPS, 1) + 0.1 * torch.randn(2 * NCROPS, 10)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                given = teacher(x[:4])
            value = loss(student(x), given, 0)
        y = (given if fused else features.pop()).double()
        norms = last_layer.weight_g.double().squeeze(1).abs()
        w = last_layer.weight_g.double() * normalize(last_layer.weight_v.double(), dim=1)
        log_c = log_vmf_normalizer(norms / temperature, P_OF_MODELS)
        exact = 0.9 * exact + 0.1 * (y @ w.T / temperature + log_c).softmax(dim=1).mean(dim=0).log()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 0.01)
    assert value.isfinite()
    assert all(parameter.isfinite().all() for parameter in student.parameters())
    torch.testing.assert_close(loss.log_center.double(), exact, rtol=1e-5, atol=1e-5)
    assert (loss.log_center - loss.log_center.mean()).abs().max() > 0.1  # it has moved
