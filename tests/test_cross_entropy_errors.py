"""What `prototype_cross_entropy` refuses, and what it says then."""

import re
from typing import Any

import pytest
import torch

from cross_entropy_problems import gradients, problem, reference
from devices import DEVICES
from vmf_heads import prototype_cross_entropy
from vmf_heads._unit_rows import unit_rows
from vmf_heads.cross_entropy import dino_pairs

# of problem((7, 5, 13, 3, 2)); `student` and `teacher` name the fields that change
REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"normalizer": "l2"}, ValueError, "`normalizer` (='l2') must be one of 'vmf', 'none'"),
    ({"center_on": "logits"}, ValueError, "`center_on` (='logits') must be one of 'scores', 'responsibilities'"),
    ({"student_temperature": 0}, ValueError, "`student_temperature` (=0) must be a finite number > 0"),
    ({"teacher_temperature": -0.1}, ValueError, "`teacher_temperature` (=-0.1) must be a finite number > 0"),
    ({"batch_chunk_size": 0}, ValueError, "`batch_chunk_size` (=0) must be an integer >= 1"),
    ({"batch_chunk_size": 2.5}, TypeError, "`batch_chunk_size` (=2.5) must be an integer >= 1"),
    (
        {"student": {"directions": torch.ones(13)}},
        ValueError,
        "`student.directions` (of shape (13,)) must be (K, p)",
    ),
    (
        {"teacher": {"directions": torch.ones(12, 3)}},
        ValueError,
        "`teacher.directions` (of shape (12, 3)) must have the shape of `student.directions` (=(13, 3))",
    ),
    (
        {"student": {"features": torch.ones(7, 4)}},
        ValueError,
        "`student.features` (of shape (7, 4)) must be (N, p) with p (=3) of the prototypes",
    ),
    (
        {"teacher": {"features": torch.ones(1, 5, 3)}},
        ValueError,
        "`teacher.features` (of shape (1, 5, 3)) must be (N, p) with p (=3) of the prototypes",
    ),
    (
        {"teacher_rows": None, "weights": None},
        ValueError,
        "`teacher_rows` (=None) needs as many rows in `student.features` (=7) as in `teacher.features` (=5)",
    ),
    (
        {"teacher_rows": torch.zeros(7, dtype=torch.int64)},
        ValueError,
        "`teacher_rows` (of shape (7,), torch.int64) must be (Ns, M) int64 with Ns (=7) rows",
    ),
    (
        {"teacher_rows": torch.zeros(6, 2, dtype=torch.int64)},
        ValueError,
        "`teacher_rows` (of shape (6, 2), torch.int64) must be (Ns, M) int64 with Ns (=7) rows",
    ),
    (
        {"teacher_rows": torch.zeros(7, 2, dtype=torch.int32)},
        ValueError,
        "`teacher_rows` (of shape (7, 2), torch.int32) must be (Ns, M) int64 with Ns (=7) rows",
    ),
    (
        {"weights": torch.ones(7)},
        ValueError,
        "`weights` (of shape (7,)) must have the shape of `teacher_rows` (=(7, 2))",
    ),
    (
        {"teacher_rows": None, "teacher": {"features": torch.ones(7, 3)}},
        ValueError,
        "`weights` (of shape (7, 2)) must have the shape of `teacher_rows` (=(7, 1))",
    ),
    *(
        (
            changed,
            ValueError,
            f"`{name}` (of shape (13, 1)) must be (K,) with K (=13) the number of prototypes",
        )
        for name, changed in {
            "student.scales": {"student": {"scales": torch.ones(13, 1)}},
            "teacher.scales": {"teacher": {"scales": torch.ones(13, 1)}},
            "log_center": {"log_center": torch.ones(13, 1)},
        }.items()
    ),
    (
        {"student": {"scales": torch.ones(13)}},
        TypeError,
        "features, directions and scales (of torch.float32, torch.float64) must all be float64 or none",
    ),
    (
        {"weights": torch.ones(7, 2).requires_grad_()},
        ValueError,
        "`weights` must not require grad: no gradient flows to them here. Pass `weights.detach()`, or use "
        "`prototype_cross_entropy_reference`",
    ),
    *(
        (
            {name: torch.tensor(0.1).requires_grad_()},
            ValueError,
            f"`{name}` (=0.1) must not require grad: no gradient flows to it here. Pass a number, or use "
            "`prototype_cross_entropy_reference`",
        )
        for name in ("student_temperature", "teacher_temperature")
    ),
    (
        {"student_temperature": torch.ones(2)},
        TypeError,
        "`student_temperature` (=tensor([1., 1.])) must be a finite number > 0",
    ),
    *(
        (
            {name: {"features": torch.full((7 if name == "student" else 5, 3), 3**-0.5 * length).double()}},
            ValueError,
            f"`{name}.features` (of shape ({7 if name == 'student' else 5}, 3)) must hold unit vectors, as "
            f"torch.nn.functional.normalize(x, dim=-1) makes them; {7 if name == 'student' else 5} of "
            f"{7 if name == 'student' else 5} rows that were looked at have lengths from {length} to {length}",
        )
        for name, length in (("student", 1.02), ("teacher", 0.5))
    ),
    (
        {"teacher": {"features": torch.ones(0, 3).double()}},
        ValueError,
        "`teacher_rows` must be -1 everywhere, because `teacher.features` has no rows",
    ),
]


@pytest.mark.parametrize(("changed", "error", "message"), REFUSED, ids=[message[:60] for _, _, message in REFUSED])
def test_refused(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = problem((7, 5, 13, 3, 2))
    for name, value in changed.items():
        arguments[name] = arguments[name]._replace(**value) if name in ("student", "teacher") else value
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        prototype_cross_entropy(**arguments)


def test_a_row_beyond_the_teacher_is_an_error() -> None:
    arguments = problem((7, 5, 13, 3, 2))
    arguments["teacher_rows"][3, 1] = 5
    message = r"`teacher_rows` \(with 5\) must be less than the rows in `teacher.features` \(=5\)"
    with pytest.raises(IndexError, match=message):
        prototype_cross_entropy(**arguments)


def test_weights_that_require_grad_are_fine_without_a_gradient() -> None:
    arguments = problem((7, 5, 13, 3, 2))
    arguments["weights"].requires_grad_()
    with torch.no_grad():
        torch.testing.assert_close(prototype_cross_entropy(**arguments)[0], reference(arguments)[0].detach())


def test_a_temperature_may_be_a_tensor() -> None:
    arguments = problem((7, 5, 13, 3, 2))
    want = prototype_cross_entropy(**arguments)[0]
    arguments |= {
        name: torch.tensor(arguments[name]).double() for name in ("student_temperature", "teacher_temperature")
    }
    torch.testing.assert_close(prototype_cross_entropy(**arguments)[0], want)


@pytest.mark.parametrize("weighted", [True, False])
def test_no_teacher_rows_and_none_wanted(weighted: bool) -> None:
    """A rank may have nothing to compare with: its loss and its gradients are 0, and its statistics those of no row."""
    arguments = problem((7, 0, 13, 3, 2)) | {"teacher_rows": torch.full((7, 2), -1)}
    if not weighted:
        arguments["weights"] = None
    loss, log_sum, rows = prototype_cross_entropy(**arguments)
    assert (loss.item(), rows) == (0, 0)
    assert log_sum.eq(-torch.inf).all()
    assert all(gradient.eq(0).all() for gradient in gradients(loss, arguments).values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_unit_vectors_in_any_precision_pass(dtype: torch.dtype) -> None:
    """Also rows of 0, which normalising zeros gives, and rows that diverged: a GradScaler has to see those."""
    for p in (2, 3, 64, 2048):
        unit_rows("x", torch.nn.functional.normalize(torch.randn(50, p, dtype=torch.float64), dim=1).to(dtype))
    unit_rows("x", torch.zeros(3, 4, dtype=dtype))
    unit_rows("x", torch.tensor([[torch.inf, 0], [torch.nan, 1], [1, 0]], dtype=dtype))
    unit_rows("x", torch.ones(0, 4, dtype=dtype))


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 1000])
def test_a_scale_that_was_forgotten_is_found_in_few_rows(rows: int) -> None:
    seen = []

    class Rows(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(function)
            return function(*args, **(kwargs or {}))

    x = torch.nn.functional.normalize(torch.randn(rows, 16), dim=1) * 20
    with pytest.raises(
        ValueError, match=rf"of {min(rows, -(-rows // -(-rows // 8)))} rows that were looked at .* from 20"
    ):
        unit_rows("x", x)
    with Rows():  # tools that replace operations, and compilers, see no operation of the check
        unit_rows("x", x)
    assert seen == []
    torch.func.vmap(lambda rows: (unit_rows("x", rows), rows)[1])(x[None])


@pytest.mark.skipif("cuda" not in DEVICES, reason="needs a GPU: only there does looking make the host wait")
def test_on_a_gpu_only_the_first_call_looks() -> None:
    x = torch.nn.functional.normalize(torch.randn(50, 7, device="cuda"), dim=1)
    unit_rows("of this test", x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        unit_rows("of this test", x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with pytest.raises(ValueError, match=r"`another` .* must hold unit vectors"):
        unit_rows("another", 2 * x)


@pytest.mark.parametrize(
    ("batch_size", "ncrops", "ngcrops", "message"),
    [
        (0, 2, 2, "`batch_size` (=0) must be an integer >= 1"),
        (3, 1, 1, "`ncrops` (=1) must be an integer >= 2"),
        (3, 2, 3, "`ncrops` (=2) must be an integer >= 3"),
        (3, 2, 0, "`ngcrops` (=0) must be an integer >= 1"),
    ],
)
def test_dino_pairs_refuses(batch_size: int, ncrops: int, ngcrops: int, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        dino_pairs(batch_size, ncrops, ngcrops=ngcrops)
