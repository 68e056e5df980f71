import pytest
import torch
from torch import nn

from training.ema import ema_update


def two_networks() -> tuple[nn.Module, nn.Module]:
    teacher, student = (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)) for _ in range(2))
    student(torch.randn(8, 3))
    return teacher, student


def test_parameters_and_float_buffers_are_averaged_and_counters_copied() -> None:
    teacher, student = two_networks()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    ema_update(teacher, student, 0.9)
    theirs = student.state_dict()
    for name, value in teacher.state_dict().items():
        if name == "1.num_batches_tracked":
            assert value == 1
        else:
            torch.testing.assert_close(value, 0.9 * before[name] + 0.1 * theirs[name])
    assert not torch.equal(teacher[1].running_mean, before["1.running_mean"])


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_the_ends_are_exact(momentum: float) -> None:
    teacher, student = two_networks()
    expected = [p.clone() for p in (student if momentum == 0 else teacher).parameters()]
    ema_update(teacher, student, momentum)
    assert all(map(torch.equal, teacher.parameters(), expected))


def test_the_student_and_autograd_are_left_alone() -> None:
    teacher, student = two_networks()
    expected = [p.clone() for p in student.parameters()]
    ema_update(teacher, student, 0.5)
    assert all(map(torch.equal, student.parameters(), expected))
    assert all(p.grad_fn is None for p in teacher.parameters())


def test_different_networks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`teacher` and `student` must hold .* of the same shapes"):
        ema_update(nn.Linear(3, 4), nn.Linear(3, 5), 0.9)
