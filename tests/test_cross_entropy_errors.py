"""What `prototype_cross_entropy` refuses, and what it says then."""

import re
from typing import Any

import pytest
import torch

from cross_entropy_problems import problem
from vmf_heads import prototype_cross_entropy
from vmf_heads.cross_entropy import dino_pairs

# of problem((7, 5, 13, 3, 2))
REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"reduction": "mean"}, ValueError, "`reduction` (='mean') must be one of 'sum', 'none'"),
    ({"center_on": "logits"}, ValueError, "`center_on` (='logits') must be one of 'scores', 'responsibilities'"),
    ({"student_temperature": 0}, ValueError, "`student_temperature` (=0) must be a finite number > 0"),
    ({"teacher_temperature": -0.1}, ValueError, "`teacher_temperature` (=-0.1) must be a finite number > 0"),
    ({"chunk_rows": 0}, ValueError, "`chunk_rows` (=0) must be an integer >= 1"),
    ({"chunk_rows": 2.5}, TypeError, "`chunk_rows` (=2.5) must be an integer >= 1"),
    ({"student_prototypes": torch.ones(13)}, ValueError, "`student_prototypes` (of shape (13,)) must be (K, p)"),
    (
        {"teacher_prototypes": torch.ones(12, 3)},
        ValueError,
        "`teacher_prototypes` (of shape (12, 3)) must have the shape of `student_prototypes` (=(13, 3))",
    ),
    (
        {"student_features": torch.ones(7, 4)},
        ValueError,
        "`student_features` (of shape (7, 4)) must be (N, p) with p (=3) of the prototypes",
    ),
    (
        {"teacher_features": torch.ones(1, 5, 3)},
        ValueError,
        "`teacher_features` (of shape (1, 5, 3)) must be (N, p) with p (=3) of the prototypes",
    ),
    (
        {"targets": None, "weights": None},
        ValueError,
        "`targets` (=None) needs as many rows in `student_features` (=7) as in `teacher_features` (=5)",
    ),
    (
        {"targets": torch.zeros(7, dtype=torch.int64)},
        ValueError,
        "`targets` (of shape (7,), torch.int64) must be (Ns, M) int64 with Ns (=7) rows",
    ),
    (
        {"targets": torch.zeros(6, 2, dtype=torch.int64)},
        ValueError,
        "`targets` (of shape (6, 2), torch.int64) must be (Ns, M) int64 with Ns (=7) rows",
    ),
    (
        {"targets": torch.zeros(7, 2, dtype=torch.int32)},
        ValueError,
        "`targets` (of shape (7, 2), torch.int32) must be (Ns, M) int64 with Ns (=7) rows",
    ),
    ({"weights": torch.ones(7)}, ValueError, "`weights` (of shape (7,)) must have the shape of `targets` (=(7, 2))"),
    (
        {"targets": None, "teacher_features": torch.ones(7, 3)},
        ValueError,
        "`weights` (of shape (7, 2)) must have the shape of `targets` (=(7, 1))",
    ),
    *(
        (
            {name: torch.ones(13, 1)},
            ValueError,
            f"`{name}` (of shape (13, 1)) must be (K,) with K (=13) the number of prototypes",
        )
        for name in (
            "student_scale",
            "teacher_scale",
            "student_log_normalizer",
            "teacher_log_normalizer",
            "log_center",
        )
    ),
    (
        {"student_scale": torch.ones(13)},
        TypeError,
        "features, prototypes and scales (of torch.float32, torch.float64) must all be float64 or none",
    ),
]


@pytest.mark.parametrize(("changed", "error", "message"), REFUSED, ids=[message[:60] for _, _, message in REFUSED])
def test_refused(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        prototype_cross_entropy(**problem((7, 5, 13, 3, 2)) | changed)


def test_a_target_beyond_the_teacher_is_an_error() -> None:
    arguments = problem((7, 5, 13, 3, 2))
    arguments["targets"][3, 1] = 5
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
