"""The contenders of `python -m benchmarks loss` do the same work, and docs/loss.md quotes what was measured."""

import pytest
import torch
from benchmarks.loss import contenders, memory, report
from benchmarks.loss.inputs import STUDENT_TEMPERATURE, Inputs, Size

from test_cross_entropy import Products

SIZES = [Size("crops", 4, 3, 37, 5), Size("patches", 0, 7, 37, 5)]


def step(contender: contenders.Contender, size: Size, *, weight_norm: bool) -> tuple[torch.Tensor, list]:
    inputs = Inputs(size, "cpu", weight_norm=weight_norm)
    loss = contender(inputs)
    loss.backward()
    return loss.detach(), [leaf.grad for leaf in inputs.leaves]


@pytest.mark.parametrize("weight_norm", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: size.name)
def test_fused_and_unfused_agree(size: Size, weight_norm: bool) -> None:
    fused, unfused = (step(call, size, weight_norm=weight_norm) for call in (contenders.fused, contenders.unfused))
    torch.testing.assert_close(fused, unfused)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: size.name)
def test_plain_is_unfused_without_the_normalisers(size: Size, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, (y, w, _) = step(contenders.plain, size, weight_norm=False)
    monkeypatch.setattr(Inputs, "log_normalizers", lambda self: (torch.zeros(37), torch.zeros(37)))
    unfused, (unfused_y, unfused_w, _) = step(contenders.unfused, size, weight_norm=False)
    torch.testing.assert_close((plain, y, w), (unfused, unfused_y, unfused_w))


@pytest.mark.parametrize("size", SIZES, ids=lambda size: size.name)
def test_the_floor_has_the_products_of_the_fused_loss(size: Size, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Inputs, "log_normalizers", lambda self: (None, None))  # theirs are products with vectors
    inputs = Inputs(size, "cpu", weight_norm=False)
    with Products() as floor:
        contenders.products(inputs)
    with Products() as fused:
        contenders.fused(inputs).backward()
    assert floor.multiplications == fused.multiplications > 0


def test_the_peak_is_that_of_what_lives_at_a_time() -> None:
    kept = torch.zeros(1000)

    def call() -> torch.Tensor:
        for _ in range(3):
            two = kept.repeat(2)  # 8000 bytes, freed before the next
        return two[:1] / STUDENT_TEMPERATURE

    assert 8000 <= memory.peak(call, "cpu") <= 8000 * 2 + 4 + 3 * 64


def test_the_page_shows_the_committed_result() -> None:
    text = report.DOCS.read_text()
    assert report.rendered(text) == text, "run `python -m benchmarks loss`"
