"""The contenders of `python -m benchmarks loss` do the same work, and docs/loss.md quotes what was measured."""

from functools import partial

import pytest
import torch
from benchmarks.loss import attention, chunked, contenders, measure, memory, peers, report
from benchmarks.loss.inputs import STUDENT_TEMPERATURE, Inputs, Size
from benchmarks.loss.work import work

from devices import DEVICES
from test_cross_entropy import Products
from vmf_heads import cross_entropy

SIZES = [Size("crops", 4, 3, 37, 5), Size("patches", 0, 7, 37, 5)]
ATTENDED = [Size("crops", 4, 3, 40, 16), Size("patches", 0, 7, 40, 16)]  # what attention kernels of a GPU take


def step(
    contender: contenders.Contender, size: Size, *, weight_norm: bool, device: str = "cpu"
) -> tuple[torch.Tensor, list]:
    inputs = Inputs(size, device, weight_norm=weight_norm)
    loss = contender(inputs)
    loss.backward()
    return loss.detach(), [leaf.grad for leaf in inputs.leaves]


@pytest.mark.parametrize("weight_norm", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: size.name)
def test_fused_and_unfused_agree(size: Size, weight_norm: bool) -> None:
    fused, unfused = (step(call, size, weight_norm=weight_norm) for call in (contenders.fused, contenders.unfused))
    torch.testing.assert_close(fused, unfused)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # on purpose: the CPU is for testing
@pytest.mark.parametrize("kernel", [attention.flex, attention.sdpa])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", ATTENDED, ids=lambda size: size.name)
def test_attention_gives_the_loss_and_its_gradients(size: Size, device: str, kernel: attention.Attention) -> None:
    """On a GPU to the precision of its kernels' products."""
    by_attention = partial(attention.by_attention, attention=kernel)
    got, want = (step(call, size, weight_norm=False, device=device) for call in (by_attention, contenders.unfused))
    torch.testing.assert_close(got, want, **({"rtol": 1e-3, "atol": 1e-4} if device == "cuda" else {}))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: size.name)
def test_chunks_give_the_loss_and_its_gradients(size: Size, device: str) -> None:
    by_chunks = partial(chunked.by_chunks, chunk_rows=3, compiled=device == "cuda")
    got, want = (step(call, size, weight_norm=True, device=device) for call in (by_chunks, contenders.unfused))
    torch.testing.assert_close(got, want)


@pytest.mark.skipif(not hasattr(torch.nn.functional, "linear_cross_entropy"), reason="needs torch 2.13")
@pytest.mark.parametrize("size", SIZES, ids=lambda size: size.name)
def test_linear_cross_entropy_is_plain_dino(size: Size, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the reference inside torch, because not every version takes probabilities in chunks."""
    monkeypatch.setattr(torch.nn, "LinearCrossEntropyOptions", lambda: None)
    got, want = (step(call, size, weight_norm=True) for call in (contenders.linear, contenders.plain))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: size.name)
def test_plain_is_unfused_without_the_normalisers(size: Size, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, (y, w) = step(contenders.plain, size, weight_norm=False)
    monkeypatch.setattr(Inputs, "log_normalizers", lambda self: (torch.zeros(37), torch.zeros(37)))
    unfused, (unfused_y, unfused_w) = step(contenders.unfused, size, weight_norm=False)
    torch.testing.assert_close((plain, y, w), (unfused, unfused_y, unfused_w))


@pytest.mark.parametrize("half", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weight_norm", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: size.name)
def test_the_floor_has_the_products_of_the_fused_loss(
    size: Size, weight_norm: bool, half: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also under the autocast of CUDA, which both believe they are in."""
    for module in (contenders, cross_entropy):
        monkeypatch.setattr(module, "autocast_dtype", lambda device: half)
    inputs = Inputs(size, "cpu", weight_norm=weight_norm)
    with Products(dim=size.dimension) as floor:
        contenders.products(inputs)
    with Products(dim=size.dimension) as fused:
        contenders.fused(inputs).backward()
    assert floor.multiplications == fused.multiplications > 0


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # inside Liger
def test_other_libraries_have_the_gradients_of_plain_dino() -> None:
    size = Size("crops", 4, 3, 37, 16)
    found, missing = peers.available(size)
    if not found:
        pytest.skip(f"none is here: {missing}")
    _, (want_y, want_w) = step(contenders.plain, size, weight_norm=False)
    for name, call in found.items():  # not the loss: Liger's is a KL divergence, without the targets' entropy
        _, (y, w) = step(call, size, weight_norm=False)
        torch.testing.assert_close((y, w), (want_y, want_w), msg=lambda message, name=name: f"{name}: {message}")


def test_the_peak_is_that_of_what_lives_at_a_time() -> None:
    kept = torch.zeros(1000)

    def call() -> torch.Tensor:
        for _ in range(3):
            two = kept.repeat(2)  # 8000 bytes, freed before the next
        return two[:1] / STUDENT_TEMPERATURE

    assert 8000 <= memory.peak(call, "cpu") <= 8000 * 2 + 4 + 3 * 64


def test_a_brief_size_has_one_table() -> None:
    size = Size("crops", 4, 3, 37, 5, brief=True)
    tables = report.size_tables(measure.measure([size], "cpu", autocast=False, quick=True))
    names = [line.split(" | ")[0].removeprefix("| ") for line in tables.splitlines() if line.startswith("| ")]
    assert tables.startswith(f"**{size}**, from the head's parameters\n")
    assert names[2:] == [contenders.PLAIN, contenders.FUSED, contenders.PRODUCTS]


def test_a_contender_that_raises_is_reported_and_the_others_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(inputs: Inputs) -> torch.Tensor:
        raise RuntimeError  # without a message, as some do

    found = {contenders.PLAIN: contenders.plain, contenders.FUSED: contenders.fused, "broken": broken}
    monkeypatch.setattr(measure, "_contenders", lambda inputs: (found, {}))
    monkeypatch.setattr(measure, "peak", lambda call, device: 2**20)  # a profiler, which takes a second
    rows = measure.measure_case(SIZES[0], "cpu", weight_norm=True, autocast=False, quick=True)
    assert {row["contender"]: row.get("missing") for row in rows} == {
        contenders.PLAIN: None,
        contenders.FUSED: None,
        contenders.PRODUCTS: None,
        "broken": "failed (RuntimeError: )",
    }
    rows = measure.measure_case(SIZES[0], "cpu", weight_norm=True, autocast=False, quick=True, deadline=0)
    assert [row["contender"] for row in rows if row.get("missing") == "no time was left"] == ["broken"]


def test_a_budget_is_that_of_the_chunks_that_the_loss_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    made = set()
    monkeypatch.setattr(contenders, "fused", lambda inputs, chunk_rows: made.add(chunk_rows) or inputs.y.sum())
    monkeypatch.setattr(measure, "peak", lambda call, device: 2**20)
    size = Size("crops", 6, 8, 2**14, 2)
    rows = measure.measure_chunks(size, "cpu", (1, 2), autocast=False, quick=True)
    assert [(row["mebibytes"], row["chunk_rows"]) for row in rows] == [(1, 16), (2, 32)]
    assert made == {16, 32}


def test_the_work_is_that_of_the_operations() -> None:
    """A product of (2, 3) and (3, 5), an addition into it, and a transposed view, which is free."""
    a, b = torch.zeros(2, 3), torch.zeros(3, 5)
    counted = work(lambda: torch.mm(a, b).add_(1).t())
    assert counted == {"multiplications": 2 * 3 * 5, "moved_bytes": 4 * (6 + 15 + 10 + 10 + 10)}
    several = work(lambda: torch.bmm(torch.zeros(4, 2, 3), torch.zeros(4, 3, 5)))
    assert several["multiplications"] == 4 * 2 * 3 * 5


def test_rows_in_which_another_loss_is_faster_are_named() -> None:
    def row(contender: str, seconds: float) -> dict[str, object]:
        return {"size": "crops", "start": measure.STARTS[True], "contender": contender, "step_s": seconds}

    rows = [row(contenders.PLAIN, 4.0), row(contenders.COMPILED, 2.0), row(contenders.FUSED, 3.0)]
    rows.append(row(contenders.PRODUCTS, 1.0))
    assert report.lost(rows) == (
        "Rows lost: 1 of 1 (crops, from the head's parameters: 1.50 × plain DINO, compiled). "
        "Where no loss is compiled: 0 of 1."
    )
    rows.append(row(contenders.FUSED_COMPILED, 1.9))
    assert report.lost(rows) == "Rows lost: 0 of 1. Where no loss is compiled: 0 of 1."
    rows[0] = row(contenders.PLAIN, 2.5)
    assert report.lost(rows) == (
        "Rows lost: 0 of 1. Where no loss is compiled: 1 of 1 (crops, from the head's parameters: 1.20 × plain DINO)."
    )


def test_the_page_shows_the_committed_result() -> None:
    text = report.DOCS.read_text()
    assert report.rendered(text) == text, "run `python -m benchmarks loss`"


@pytest.mark.parametrize("page", ["README.md", "docs/loss.md"])
def test_the_headline_is_that_of_the_committed_result(page: str) -> None:
    text = " ".join((report.DOCS.parents[1] / page).read_text().split())
    assert report.headline() in text, "run `python -m benchmarks loss` and quote its headline"
