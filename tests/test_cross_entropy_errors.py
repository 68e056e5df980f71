"""What `prototype_cross_entropy` refuses, and what it says then."""

import re
from typing import Any

import pytest
import torch

from cross_entropy_problems import problem
from vmf_heads import prototype_cross_entropy
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
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        prototype_cross_entropy(**arguments)


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
