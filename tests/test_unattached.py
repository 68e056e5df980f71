"""A teacher's head under a stock loss warns once; heads that are used rightly do not. Warnings are errors here."""

import pytest
import torch
from torch import nn

from dino_original import OriginalLoss
from vmf_heads import TeacherTargets, VMFPrototypeHead, set_temperature
from vmf_heads.compat import dinov3
from vmf_heads.compat.stable_pretraining import DINOProjector

K, P = 24, 8
X = torch.randn(10, 16)
MESSAGE = r"this head looks like a teacher's .* set_temperature\(teacher, t\)"


def head(norm: float = 1.3, cls: type = VMFPrototypeHead, **options) -> VMFPrototypeHead:
    made = cls(16, K, hidden_dim=12, bottleneck_dim=P, **options)
    with torch.no_grad():
        for name, parameter in made.last_layer.named_parameters():
            if name != "weight_v":
                parameter.fill_(norm)
    return made


def test_a_teacher_under_dinos_own_loss_warns_once():
    student, teacher = head(), head().requires_grad_(False)
    loss = OriginalLoss(K, 2, 0.04, 0.04, 0, 1)
    with pytest.warns(UserWarning, match=MESSAGE):
        loss(student(X), teacher(X), 0)
    for _ in range(4):
        loss(student(X), teacher(X), 0)


def test_norms_that_move_later_are_noticed():
    teacher = head(1.0).requires_grad_(False)
    for _ in range(31):
        teacher(X)
    teacher.last_layer.weight_g.fill_(1.3)
    with pytest.warns(UserWarning, match=MESSAGE):
        teacher(X)  # the 32nd call


RIGHT = {
    "a student": lambda: head(),
    "inference": lambda: head().eval().requires_grad_(False),
    "norms of 1": lambda: head(1.0).requires_grad_(False),
    "raw scores": lambda: head(output="scores").requires_grad_(False),
    "a temperature of its own": lambda: head(temperature=0.04).requires_grad_(False),
    "plain DINO": lambda: head(normalizer="none").requires_grad_(False),
    "DINOv3, whose losses are its own": lambda: head(cls=dinov3.DINOHead).requires_grad_(False),
}


@pytest.mark.parametrize("right", RIGHT.values(), ids=RIGHT)
def test_heads_that_know_what_they_do_are_left_alone(right):
    made = right()
    for _ in range(4):
        made(X)


def test_whoever_names_a_temperature_is_left_alone():
    teacher = head().requires_grad_(False)
    teacher(X, temperature=0.1)
    set_temperature(teacher, 0.05)
    teacher(X)


def test_attached_heads_are_left_alone():
    student, teacher = head(), head().requires_grad_(False)
    TeacherTargets(K).attach(student, teacher)
    teacher(X)
    with torch.no_grad():
        student(X)


def test_norms_without_values_are_left_alone():
    """On the meta device, and where vmap runs several heads at once."""
    head().requires_grad_(False).to("meta")(X.to("meta"))
    several = [DINOProjector(16, 12, P, K).requires_grad_(False) for _ in range(2)]
    parameters, buffers = torch.func.stack_module_state(several)
    template = DINOProjector(16, 12, P, K).to("meta")
    run = torch.func.vmap(lambda p, b, x: torch.func.functional_call(template, (p, b), (x,)), (0, 0, None))
    with torch.no_grad():
        assert run(parameters, buffers, X).shape == (2, len(X), K)


def test_a_compiled_head_is_traced_in_one_graph():
    teacher = nn.Sequential(head().requires_grad_(False))
    compiled = torch.compile(teacher, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), teacher.eval()(X))
