"""`prototype_cross_entropy` equals its reference, which holds every logit: value, statistics and all gradients."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import vmf_reference
from cross_entropy_problems import SHAPES, cast, gradients, problem, reference, weight_normed
from devices import DEVICES
from vmf_heads import HeadOutput, _targets, prototype_cross_entropy
from vmf_heads._logits import log_sum_of_predictions
from vmf_heads.cross_entropy import dino_pairs, prototype_cross_entropy_reference

SHAPE = (7, 5, 13, 3, 2)
SQUARE = (5, 5, 13, 3, 1)

SCALES = pytest.mark.parametrize("scales", [False, True], ids=["prototypes", "directions and scales"])
SAME_POSITION = pytest.mark.parametrize("same_position", [False, True], ids=["any position", "same position"])
NORMALIZER = pytest.mark.parametrize("normalizer", ["vmf", "none"])
CENTER_ON = pytest.mark.parametrize("center_on", ["scores", "responsibilities"])


def assert_equals_reference(arguments: dict[str, Any]) -> None:
    loss, log_sum, rows = prototype_cross_entropy(**arguments)
    expected, expected_log_sum, expected_rows = reference(arguments)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(log_sum, expected_log_sum)
    assert rows == expected_rows
    torch.testing.assert_close(gradients(loss, arguments), gradients(expected, arguments))


@pytest.mark.parametrize("device", DEVICES)
@CENTER_ON
@NORMALIZER
@pytest.mark.parametrize("batch_chunk_size", [1, 3, None])
@SCALES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference(
    shape: tuple, scales: bool, batch_chunk_size: int | None, normalizer: str, center_on: str, device: str
) -> None:
    options = {"batch_chunk_size": batch_chunk_size, "normalizer": normalizer, "center_on": center_on}
    assert_equals_reference(problem(shape, scales=scales, device=device) | options)


@CENTER_ON
@pytest.mark.parametrize("batch_chunk_size", [1, 3, None])
@SAME_POSITION
def test_equals_the_reference_with_statistics_from_logits(
    same_position: bool, batch_chunk_size: int | None, center_on: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they are made wherever the exponentials of the targets do not hold them, and always on a GPU."""
    monkeypatch.setattr(_targets, "log_sum_of_predictions", lambda p, bias: None)
    arguments = problem(SQUARE if same_position else SHAPE, scales=True, same_position=same_position)
    assert_equals_reference(arguments | {"batch_chunk_size": batch_chunk_size, "center_on": center_on})


@CENTER_ON
@pytest.mark.parametrize(("norm", "underflow"), [(1.0, False), (30.0, True)])
def test_statistics_keep_the_prototypes_that_float32_would_lose(
    norm: float, underflow: bool, center_on: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[bool] = []

    def observed(p: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
        result = log_sum_of_predictions(p, bias)
        found.append(result is None)
        return result

    monkeypatch.setattr(_targets, "log_sum_of_predictions", observed)
    arguments = problem((9, 40, 3000, 16, 2), scales=True, dtype=torch.float32) | {"center_on": center_on}
    arguments["teacher"] = arguments["teacher"]._replace(scales=torch.full((3000,), norm))
    exact = arguments | {side: cast(arguments[side], torch.float64) for side in ("student", "teacher")}
    exact |= {name: arguments[name].double() for name in ("log_center", "weights")}
    _, expected, _ = reference(exact)
    _, log_sum, _ = prototype_cross_entropy(**arguments)
    assert found == [underflow]
    assert (expected.min() < -200) == underflow
    torch.testing.assert_close(log_sum.double(), expected, rtol=1e-5, atol=1e-4 * norm)


@pytest.mark.parametrize("device", DEVICES)
@CENTER_ON
@NORMALIZER
@pytest.mark.parametrize("batch_chunk_size", [1, 3, None])
@pytest.mark.parametrize("weighted", [True, False])
@SCALES
@pytest.mark.parametrize("shape", [(1, 1, 2, 2, 1), (11, 11, 13, 3, 1)], ids=str)
def test_equals_the_reference_at_the_same_position(
    shape: tuple,
    scales: bool,
    weighted: bool,
    batch_chunk_size: int | None,
    normalizer: str,
    center_on: str,
    device: str,
) -> None:
    arguments = problem(shape, scales=scales, same_position=True, device=device)
    arguments |= {"batch_chunk_size": batch_chunk_size, "normalizer": normalizer, "center_on": center_on}
    assert_equals_reference(arguments if weighted else arguments | {"weights": None})


@pytest.mark.parametrize("loss", [prototype_cross_entropy, prototype_cross_entropy_reference])
@CENTER_ON
def test_equals_the_equations_of_the_paper(loss: Any, center_on: str) -> None:
    """Eq. 6, 7 and 9 with SciPy's Bessel functions, which know nothing of the library's log C_p."""
    arguments = problem(SHAPE) | {"center_on": center_on}
    (y, w, _), (z, u, _) = arguments["student"], arguments["teacher"]
    p, student_temperature, teacher_temperature = 3, 0.1, 0.04
    log_c = vmf_reference.with_gradient(w.norm(dim=1), p, student_temperature)
    log_student = (y @ w.T / student_temperature + log_c).log_softmax(dim=1)
    targets = vmf_reference.teacher(z @ u.T, u.norm(dim=1), p, teacher_temperature, arguments["log_center"])
    pairs = zip(arguments["teacher_rows"].T, arguments["weights"].T, strict=True)
    expected = sum(-(weight * (row >= 0) * (targets[row] * log_student).sum(dim=1)).sum() for row, weight in pairs)
    averaged = z @ u.T / teacher_temperature
    if center_on == "responsibilities":
        averaged = averaged + vmf_reference.log_normalizer(u.norm(dim=1) / teacher_temperature, p)

    value, log_sum, rows = loss(**arguments)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(log_sum, averaged.softmax(dim=1).sum(dim=0).log())
    assert rows == 5
    torch.testing.assert_close(gradients(value, arguments), gradients(expected, arguments))


def test_prototypes_without_scales_learn_through_their_norms_too() -> None:
    """Their gradient has the share of log C_p, which has the direction of the prototype itself."""
    arguments = problem(SHAPE)
    learned = {
        name: gradients(prototype_cross_entropy(**arguments, normalizer=name)[0], arguments)["directions"]
        for name in ("vmf", "none")
    }
    assert not torch.allclose(learned["vmf"], learned["none"], rtol=1e-2)
    with_zero = problem(SHAPE)
    with torch.no_grad():
        with_zero["student"].directions[3] = 0  # has no direction, and the norm's gradient is 0 there
    assert_equals_reference(with_zero)
    assert gradients(prototype_cross_entropy(**with_zero)[0], with_zero)["directions"].isfinite().all()


def test_scales_are_weight_norm() -> None:
    arguments = problem(SHAPE, scales=True)
    made = arguments | {whose: weight_normed(arguments[whose]) for whose in ("student", "teacher")}
    want, got = prototype_cross_entropy(**made)[0], prototype_cross_entropy(**arguments)[0]
    torch.testing.assert_close(got, want)
    with_scale = {name: tensor[1:] for name, tensor in gradients(got, arguments).items()}
    of_weight_norm = {name: tensor[1:] for name, tensor in gradients(want, arguments).items()}
    torch.testing.assert_close(with_scale, of_weight_norm)  # not of the first, whose scale of 0 has no sign


@pytest.mark.parametrize("whose", ["student", "teacher"])
@SAME_POSITION
def test_scales_of_one_side_only(same_position: bool, whose: str) -> None:
    arguments = problem(SQUARE, scales=True, same_position=same_position)
    assert_equals_reference(arguments | {whose: arguments[whose]._replace(scales=None)})


def test_the_gradient_of_directions_does_not_depend_on_how_many_are_worked_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmf_heads._memory.CACHE_BYTES", 4 * 4 * 3)  # 13 prototypes: three blocks of 4, and one over
    assert_equals_reference(problem(SHAPE, scales=True))


@SAME_POSITION
def test_the_largest_logit_may_be_in_any_block_of_prototypes(
    same_position: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits as far apart as these overflow without it."""
    monkeypatch.setattr("vmf_heads._memory.CACHE_BYTES", 4 * 5 * 2)  # of at most five rows: blocks of two or more
    arguments = problem(SQUARE if same_position else SHAPE, scales=True, same_position=same_position)
    for side in ("student", "teacher"):
        arguments[side].scales.data.mul_(1000)
    assert_equals_reference(arguments)


def test_a_direction_of_length_zero_has_no_prototype() -> None:
    """As in weight_norm, whose 0 / 0 is NaN."""
    arguments = problem(SHAPE, scales=True)
    with torch.no_grad():
        arguments["student"].directions[3] = 0
    assert prototype_cross_entropy(**arguments)[0].isnan()
    assert reference(arguments)[0].isnan()


@CENTER_ON
@SAME_POSITION
@pytest.mark.parametrize("absent", [["log_center"], ["weights"], ["log_center", "weights"]], ids=" and ".join)
def test_optional_arguments(absent: list[str], same_position: bool, center_on: str) -> None:
    arguments = problem(SQUARE, same_position=same_position) | dict.fromkeys(absent) | {"center_on": center_on}
    assert_equals_reference(arguments)


@pytest.mark.parametrize("ncrops", [2, 3, 10])
def test_dino_pairs_are_the_loops_of_dino(ncrops: int) -> None:
    batch_size, k = 3, 13
    arguments = problem((ncrops * batch_size, 2 * batch_size, k, 4, 2))
    teacher_rows, weights = dino_pairs(batch_size, ncrops)
    y, w, _ = arguments["student"]
    z, u, _ = arguments["teacher"]
    predictions = (y @ w.T / 0.1 + vmf_reference.with_gradient(w.norm(dim=1), 4, 0.1)).log_softmax(1).chunk(ncrops)
    targets = vmf_reference.teacher(z @ u.T, u.norm(dim=1), 4, 0.04, arguments["log_center"]).chunk(2)
    terms = [-(targets[i] * predictions[v]).sum(1).mean() for i in range(2) for v in range(ncrops) if i != v]
    arguments |= {"teacher_rows": teacher_rows, "weights": weights}
    torch.testing.assert_close(prototype_cross_entropy(**arguments)[0], sum(terms) / len(terms))
    assert_equals_reference(arguments)


@SCALES
@SAME_POSITION
def test_gradients_are_those_of_finite_differences(same_position: bool, scales: bool) -> None:
    arguments = problem((3, 3, 5, 2, 1), scales=scales, same_position=same_position) | {"batch_chunk_size": 2}

    def loss(*tensors: torch.Tensor) -> torch.Tensor:
        student = HeadOutput(*tensors[:2], tensors[2] if scales else None)
        return prototype_cross_entropy(**arguments | {"student": student})[0]

    assert torch.autograd.gradcheck(loss, [tensor for tensor in arguments["student"] if tensor is not None])


@pytest.mark.parametrize("upstream", [(1.0, 65536.0), (65536.0, 1.0), (0.5, 0.5, -3.0), (0.0, 2.0)], ids=str)
@SCALES
def test_the_upstream_gradient_scales_all_gradients(scales: bool, upstream: tuple[float, ...]) -> None:
    """In every backward pass of a graph that is retained, although the first gives away what the forward pass made."""
    arguments = problem(SHAPE, scales=scales)
    plain = gradients(reference(arguments)[0], arguments)
    loss = prototype_cross_entropy(**arguments)[0]
    passes = [gradients(factor * loss, arguments, retain_graph=True) for factor in upstream]
    for factor, scaled in zip(upstream, passes, strict=True):
        torch.testing.assert_close(scaled, {name: factor * gradient for name, gradient in plain.items()})


def test_a_gradient_that_was_written_to_is_not_given_away_again() -> None:
    arguments = problem(SHAPE, scales=True)
    loss = prototype_cross_entropy(**arguments)[0]
    gradients(2 * loss, arguments, retain_graph=True)["directions"].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_accumulate_over_backward_calls() -> None:
    arguments = problem(SHAPE, scales=True)
    plain = gradients(reference(arguments)[0], arguments)
    loss = prototype_cross_entropy(**arguments)[0]
    for factor in (0.5, 0.5, 2.0):
        loss.backward(torch.tensor(factor, dtype=torch.float64), retain_graph=True)
    accumulated = [tensor.grad for tensor in arguments["student"]]
    torch.testing.assert_close(accumulated, [3 * gradient for gradient in plain.values()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@SAME_POSITION
def test_a_centre_of_another_dtype(same_position: bool, dtype: torch.dtype) -> None:
    """`ProbabilityCentering` keeps float32, whatever the head computes in."""
    other = torch.float64 if dtype == torch.float32 else torch.float32
    arguments = problem(SQUARE, dtype=dtype, same_position=same_position)
    arguments["log_center"] = arguments["log_center"].to(other)
    loss = prototype_cross_entropy(**arguments)[0]
    assert loss.dtype == dtype
    expected = reference(arguments)[0]
    torch.testing.assert_close(loss, expected.to(dtype))
    torch.testing.assert_close(
        gradients(loss, arguments),
        gradients(expected, arguments),
        rtol=1e-4 if dtype == torch.float32 else 1e-7,
        atol=1e-5,
    )


def test_micro_batches_sum_to_the_batch() -> None:
    arguments = problem((8, 4, 13, 3, 2))
    student = arguments["student"]
    whole = gradients(prototype_cross_entropy(**arguments)[0], arguments)
    for rows in (slice(0, 5), slice(5, 8)):
        part = {name: arguments[name][rows] for name in ("teacher_rows", "weights")}
        part["student"] = student._replace(features=student.features[rows])
        prototype_cross_entropy(**arguments | part)[0].backward()
    torch.testing.assert_close({"features": student.features.grad, "directions": student.directions.grad}, whole)


def test_nothing_flows_to_the_teacher_or_the_statistics() -> None:
    arguments = problem(SHAPE, scales=True)
    carriers = [*arguments["teacher"], arguments["log_center"]]
    for tensor in carriers:
        tensor.requires_grad_()
    loss, log_sum, _ = prototype_cross_entropy(**arguments)
    assert not log_sum.requires_grad
    loss.backward()
    assert all(tensor.grad is None for tensor in carriers)


def test_no_grad() -> None:
    arguments = problem(SHAPE)
    with torch.no_grad():
        loss = prototype_cross_entropy(**arguments)[0]
    assert not loss.requires_grad
    torch.testing.assert_close(loss, reference(arguments)[0].detach())


LAST_LAYER = ["directions", "scales"]


@pytest.mark.parametrize(
    "frozen",
    [["features"], ["directions"], ["scales"], LAST_LAYER, ["features", *LAST_LAYER]],
    ids=" and ".join,
)
@SAME_POSITION
def test_frozen_inputs_change_no_other_gradient(frozen: list[str], same_position: bool) -> None:
    arguments = problem(SQUARE, scales=True, same_position=same_position)
    for name in frozen:
        getattr(arguments["student"], name).requires_grad_(False)
    loss = prototype_cross_entropy(**arguments)[0]
    assert loss.requires_grad is (len(frozen) < 3)
    if loss.requires_grad:
        torch.testing.assert_close(gradients(loss, arguments), gradients(reference(arguments)[0], arguments))


class Products(TorchDispatchMode):
    """Counts the multiplications of all products with features or prototypes, which have `dim` numbers a row."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim, self.multiplications = dim, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            left, right = args[-2:]
            if self.dim in (*left.shape, right.shape[1]):  # others, with a vector, weigh or sum probabilities
                self.multiplications += left.shape[0] * left.shape[1] * right.shape[1]
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("same_position", "frozen", "per_row"),
    [
        (False, [], 3 * 31 + 3 * 11),
        (False, ["scales"], 3 * 31 + 3 * 11),
        (False, LAST_LAYER, 2 * 31 + 2 * 11),
        (False, ["features"], 2 * 31 + 3 * 11),
        (False, ["features", *LAST_LAYER], 31 + 2 * 11),
        (True, [], 4 * 31),
        (True, LAST_LAYER, 3 * 31),
        (True, ["features", *LAST_LAYER], 2 * 31),
    ],
)
def test_number_of_products(same_position: bool, frozen: list[str], per_row: int) -> None:
    shape = (31, 31 if same_position else 11, 101, 17, 1)
    arguments = problem(shape, scales=True, same_position=same_position)
    for name in frozen:
        getattr(arguments["student"], name).requires_grad_(False)

    with Products(dim=17) as products:
        loss = prototype_cross_entropy(**arguments, batch_chunk_size=3)[0]
        if loss.requires_grad:
            loss.backward()
    assert products.multiplications == per_row * 101 * 17


def test_strides_do_not_matter() -> None:
    arguments = problem((6, 6, 13, 4, 2), scales=True)

    def strided(tensor: torch.Tensor) -> torch.Tensor:
        every_second = tensor.detach().repeat_interleave(2, dim=-1)[..., ::2]
        return every_second.requires_grad_(tensor.requires_grad)

    for whose in ("student", "teacher"):
        arguments[whose] = HeadOutput(*map(strided, arguments[whose]))
    for name in ("log_center", "teacher_rows", "weights"):
        arguments[name] = strided(arguments[name])
    transposed = arguments["student"].directions.detach().T.contiguous().T.requires_grad_()
    arguments["student"] = arguments["student"]._replace(directions=transposed)
    assert not any(tensor.is_contiguous() for tensor in arguments["student"])
    assert_equals_reference(arguments)
