"""Rows that meet are found, and the loss of rows that are worked on together is that of its definition."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from cross_entropy_problems import gradients, problem, reference
from test_cross_entropy import CENTER_ON, NORMALIZER, SCALES
from test_cross_entropy_precision import dino_problem, products_in
from vmf_heads import _loss_and_gradients, _memory, _row_groups, prototype_cross_entropy
from vmf_heads._row_groups import row_groups
from vmf_heads._rows_together import pairs_per_chunk
from vmf_heads.cross_entropy import dino_pairs


@pytest.fixture(autouse=True, scope="module")
def any_dim() -> Iterator[None]:
    """Rows are worked on together with as few dimensions as these tests have."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_row_groups, "LEAST_DIM", 1)
        yield


def pairs_of_images(images: int, students: int, teachers: int, width: int, seed: int) -> Tensor:
    """teacher_rows (images * students, width) within images, both sides in random order; some pairs are missing."""
    generator = torch.Generator().manual_seed(seed)
    within = torch.randint(-1, teachers, (images, students, width), generator=generator)
    numbers = torch.randperm(images * teachers, generator=generator).view(images, 1, teachers).expand(-1, students, -1)
    rows = torch.where(within < 0, -1, numbers.gather(2, within.clamp(min=0)))
    return rows.view(-1, width)[torch.randperm(images * students, generator=generator)]


@settings(deadline=None, max_examples=200)
@given(
    st.integers(1, 7), st.integers(1, 6), st.integers(1, 3), st.integers(1, 3), st.integers(12, 40), st.integers(0, 99)
)
def test_every_pair_is_in_one_chunk(
    images: int, students: int, teachers: int, width: int, most_rows: int, seed: int
) -> None:
    rows = pairs_of_images(images, students, teachers, width, seed)
    chunks = row_groups(rows, images * teachers, most_rows=most_rows, dim=8)
    assert chunks is not None
    found = torch.zeros(rows.numel(), dtype=torch.int64)
    trained = []
    for chunk in chunks:
        assert chunk.rows_of_memory <= most_rows
        assert chunk.rows_of_memory >= 2 * len(chunk.rows)
        for part in chunk.students:
            assert len(part.rows) <= most_rows
            assert chunk.rows_of_memory >= len(chunk.rows) + len(part.rows)
            trained.append(part.rows)
            student, teacher, place = part.pairs
            found[place] += 1
            assert torch.equal(rows.flatten()[place], chunk.rows[teacher])
            assert torch.equal(place // width, part.rows[student])
            inside = torch.zeros(len(part.rows), len(chunk.rows), dtype=torch.bool)
            for mine, others in part.groups:
                inside[mine, others] = True
            assert inside[student, teacher].all()
            assert [mine.start for mine, _ in part.groups] == [0, *(mine.stop for mine, _ in part.groups[:-1])]
            assert part.groups[-1][0].stop == len(part.rows)
    assert torch.equal(found, (rows.flatten() >= 0).long())
    assert sorted(torch.cat([chunk.rows for chunk in chunks]).tolist()) == list(range(images * teachers))
    expected = (rows >= 0).any(dim=1).nonzero().flatten()
    assert sorted(torch.cat(trained).tolist() if trained else []) == expected.tolist()


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 3), st.integers(0, 999))
def test_none_where_what_hangs_together_is_too_much(ns: int, nt: int, width: int, seed: int) -> None:
    rows = torch.randint(-1, nt, (ns, width), generator=torch.Generator().manual_seed(seed))
    student, place = (rows >= 0).nonzero().unbind(dim=1)
    graph = coo_array((torch.ones(len(student)), (student, ns + rows[student, place])), shape=(ns + nt, ns + nt))
    _, label = connected_components(graph, directed=False)
    of_student = label[:ns][(rows >= 0).any(dim=1).numpy()]
    most_students = max((int((of_student == part).sum()) for part in set(label)), default=0)
    most_teachers = max(int((label[ns:] == part).sum()) for part in set(label))
    for most_rows, dim in ((8, 100), (20, 5)):
        fits = most_students <= min(most_rows * 3 // 4, dim) and most_teachers <= most_rows // 4
        assert (row_groups(rows, nt, most_rows=most_rows, dim=dim) is not None) == fits


def test_dinos_crops_are_in_few_chunks_of_whole_images() -> None:
    teacher_rows, _ = dino_pairs(32, 12)
    (chunk,) = row_groups(teacher_rows, 64, most_rows=256, dim=256) or ()
    assert chunk.rows.tolist() == [row for image in range(32) for row in (image, 32 + image)]
    assert [len(part.rows) for part in chunk.students] == [192, 192]
    assert [[mine.stop - mine.start for mine, _ in part.groups] for part in chunk.students] == [[96, 96]] * 2


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of chunks of every loss whose rows were worked on together; blocks are small."""
    monkeypatch.setattr(_memory, "CACHE_BYTES", 2**15)
    seen: list[int] = []

    def observed(y: Tensor, w: Any, d: Any, chunks: Any, *rest: Any) -> Tensor:
        seen.append(sum(len(chunk.students) for chunk in chunks))
        return original(y, w, d, chunks, *rest)

    original = _loss_and_gradients.groups_together
    monkeypatch.setattr(_loss_and_gradients, "groups_together", observed)
    return seen


def image_problem(*, scales: bool, width: int = 2) -> dict[str, Any]:
    """11 images of 5 student rows and 2 teacher rows; K is no multiple of anything."""
    arguments = problem((55, 22, 701, 7, width), scales=scales)
    return arguments | {"teacher_rows": pairs_of_images(11, 5, 2, width, seed=1)}


def assert_equal_to_the_reference(arguments: dict[str, Any]) -> None:
    value, log_sum, rows = prototype_cross_entropy(**arguments)
    expected, expected_log_sum, _ = reference(arguments)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(log_sum, expected_log_sum)
    torch.testing.assert_close(gradients(value, arguments), gradients(expected, arguments))
    assert rows == len(arguments["teacher"].features)


@CENTER_ON
@NORMALIZER
@pytest.mark.parametrize(("batch_chunk_size", "chunks"), [(8, 12), (24, 4), (None, 1)])
@SCALES
def test_together_equals_the_reference(
    scales: bool, batch_chunk_size: int | None, chunks: int, normalizer: str, center_on: str, together: list[int]
) -> None:
    arguments = image_problem(scales=scales) | {"batch_chunk_size": batch_chunk_size}
    assert_equal_to_the_reference(arguments | {"normalizer": normalizer, "center_on": center_on})
    assert together == [chunks]


def test_weights_that_cancel_and_pairs_that_occur_twice(together: list[int]) -> None:
    arguments = image_problem(scales=True, width=3)
    arguments["teacher_rows"][:, 1] = arguments["teacher_rows"][:, 0]
    arguments["weights"][::3, 1] = -arguments["weights"][::3, 0]
    arguments["weights"][:, 2] *= -1
    assert_equal_to_the_reference(arguments)
    assert_equal_to_the_reference(arguments | {"weights": None})
    assert together == [1, 1]


def test_statistics_that_need_logits_of_their_own(together: list[int]) -> None:
    """Of norms so large that the targets' exponentials lose some of them."""
    arguments = image_problem(scales=True) | {"batch_chunk_size": 24}
    arguments["teacher"] = arguments["teacher"]._replace(scales=torch.full((701,), 150.0, dtype=torch.float64))
    assert_equal_to_the_reference(arguments)
    assert together == [4]


def test_without_gradients_and_without_pairs(together: list[int]) -> None:
    arguments = image_problem(scales=True)
    with torch.no_grad():
        torch.testing.assert_close(prototype_cross_entropy(**arguments)[0], reference(arguments)[0])
    assert_equal_to_the_reference(arguments | {"teacher_rows": torch.full((55, 2), -1)})
    assert together == [1, 0]


def test_pairs_in_memory_at_a_time() -> None:
    """On a CPU logits and targets, and of 8192 prototypes not more than what malloc keeps; elsewhere their product."""
    cpu, other = torch.device("cpu"), torch.device("meta")
    assert [pairs_per_chunk(rows, cpu) for rows in (2048, 256)] == [384, 128]
    assert 2 * 384 * 8192 * 4 < 32 * 2**20
    assert pairs_per_chunk(2048, other) == 682


def test_rows_of_few_dimensions_are_worked_on_apart(together: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = image_problem(scales=True)
    prototype_cross_entropy(**arguments)
    monkeypatch.setattr(_row_groups, "LEAST_DIM", 8)  # of 7
    prototype_cross_entropy(**arguments)
    assert together == [1]


def test_other_pairs_are_worked_on_apart(together: list[int]) -> None:
    arguments = image_problem(scales=True)
    arguments["teacher_rows"][:, 0] = torch.arange(55) % 22
    assert_equal_to_the_reference(arguments)
    assert together == []


def test_pairs_that_were_found_under_another_default_device(together: list[int]) -> None:
    arguments = image_problem(scales=True)
    with torch.device("meta"):
        prototype_cross_entropy(**arguments)
    assert_equal_to_the_reference(arguments)
    assert together == [1, 1]


def test_under_a_fake_tensor_mode_no_pair_is_read(together: list[int]) -> None:
    arguments = image_problem(scales=True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        value, _, _ = prototype_cross_entropy(**arguments)
    assert isinstance(value, FakeTensor)
    assert_equal_to_the_reference(arguments)
    assert together == [1]


def test_large_weights_in_half_precision(together: list[int]) -> None:
    """They are no factors of numbers in float16, which ends at 65504, and at 4 where small numbers are scaled up."""
    arguments = dino_problem(1.0, k=257, images=2)
    arguments["weights"] *= 1000
    with products_in(torch.float16):
        value, _, _ = prototype_cross_entropy(**arguments)
    assert all(gradient.isfinite().all() for gradient in gradients(value, arguments).values())
    assert together == []
