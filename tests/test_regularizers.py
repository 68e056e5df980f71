"""prototype_koleo: the naive formula and its gradient, in chunks; equal, single and vanishing prototypes."""

import pytest
import torch
from torch.nn import functional as F

from vmf_heads import _memory
from vmf_heads.regularizers import prototype_koleo


def naive(directions: torch.Tensor, floor: float = 1e-4) -> torch.Tensor:
    u = F.normalize(directions, dim=1)
    squares = (u[:, None] - u[None]).square().sum(dim=2)
    squares = squares + torch.diag(torch.full((len(u),), torch.inf, dtype=u.dtype))
    return -(squares.amin(dim=1) + floor**2).log().mean() / 2


@pytest.mark.parametrize("count", [2, 50])
def test_it_is_the_naive_formula_with_its_gradient_in_any_chunks(count, monkeypatch):
    torch.manual_seed(0)
    directions = (3 * torch.randn(count, 5, dtype=torch.float64)).requires_grad_()
    (wanted,) = torch.autograd.grad(naive(directions), directions)
    for rows in (7, count):
        monkeypatch.setitem(_memory.CHUNK_BYTES, "cpu", 4 * count * rows)
        value = prototype_koleo(directions)
        torch.testing.assert_close(value, naive(directions), rtol=1e-12, atol=0)
        (gradient,) = torch.autograd.grad(value, directions)
        torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-12)
        assert (gradient * directions).sum(dim=1).abs().max() < 1e-12  # norms stay free


def test_no_tensor_of_prototypes_by_prototypes_exists(monkeypatch):
    monkeypatch.setitem(_memory.CHUNK_BYTES, "cpu", 4 * 400 * 10)
    directions = torch.randn(400, 3, requires_grad=True)
    seen = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            seen.extend(x.numel() for x in (found,) if isinstance(x, torch.Tensor))
            return found

    with Sizes():
        prototype_koleo(directions).backward()
    assert 400 * 10 == max(seen)


def test_prototypes_that_are_equal_vanish_or_stand_alone_give_finite_numbers():
    directions = torch.tensor([[1.0, 2.0], [2.0, 4.0], [2.0, 4.0], [0.0, 0.0]], requires_grad=True)
    value = prototype_koleo(directions, floor=0.01)
    value.backward()
    # Three at the floor of their equal neighbour, and the row that is 0 at distance 1 of unit vectors.
    assert value.item() == pytest.approx(-(3 * torch.tensor(0.01).log().item() + 0.0) / 4, abs=1e-3)
    assert directions.grad.isfinite().all()
    single = torch.ones(1, 3, requires_grad=True)
    prototype_koleo(single).backward()
    assert single.grad.tolist() == [[0, 0, 0]]


def test_near_copies_part_and_norms_stay():
    torch.manual_seed(0)
    directions = torch.randn(8, 4).repeat_interleave(2, dim=0) + 1e-3 * torch.randn(16, 4)
    directions = (directions * torch.linspace(1, 3, 16)[:, None]).requires_grad_()
    before = F.normalize(directions.detach(), dim=1)
    norms = directions.detach().norm(dim=1)
    optimizer = torch.optim.SGD([directions], lr=0.3)
    for _ in range(60):
        optimizer.zero_grad()
        prototype_koleo(directions, floor=0.05).backward()
        optimizer.step()
    after = F.normalize(directions.detach(), dim=1)
    assert (before @ before.T).fill_diagonal_(-1).amax(dim=1).min() > 0.99
    assert (after @ after.T).fill_diagonal_(-1).amax(dim=1).max() < 0.95
    assert (directions.detach().norm(dim=1) / norms - 1).abs().max() < 0.3


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"directions": [[1.0]]}, TypeError, r"`directions` \(of list\) must be a floating tensor"),
        ({"directions": torch.ones(2, 2, dtype=torch.int64)}, TypeError, r"of torch.int64\) must be a floating"),
        ({"directions": torch.ones(3)}, ValueError, r"of shape \(3,\)\) must have shape \(K >= 1, p\)"),
        ({"directions": torch.ones(0, 3)}, ValueError, r"of shape \(0, 3\)\) must have shape \(K >= 1, p\)"),
        ({"directions": torch.ones(2, 3), "floor": 0.0}, ValueError, r"`floor` \(=0.0\) must be a finite number > 0"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        prototype_koleo(**arguments)
