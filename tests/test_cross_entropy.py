"""`prototype_cross_entropy` equals its reference, which holds every logit: value, statistics and all gradients."""

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from cross_entropy_problems import GRADIENTS, SCALED_GRADIENTS, SHAPES, gradients, problem, reference
from devices import DEVICES
from vmf_heads import prototype_cross_entropy
from vmf_heads.cross_entropy import dino_pairs

SHAPE = (7, 5, 13, 3, 2)


def assert_equals_reference(arguments: dict[str, Any]) -> None:
    loss, log_sum, rows = prototype_cross_entropy(**arguments)
    expected, expected_log_sum, expected_rows = reference(arguments)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(log_sum, expected_log_sum)
    assert rows == expected_rows
    torch.testing.assert_close(gradients(loss, arguments), gradients(expected, arguments))


SCALES = pytest.mark.parametrize("scales", [False, True], ids=["prototypes", "directions and scales"])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("center_on", ["scores", "responsibilities"])
@pytest.mark.parametrize("chunk_rows", [1, 3, None])
@SCALES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference(shape: tuple, scales: bool, chunk_rows: int | None, center_on: str, device: str) -> None:
    options = {"chunk_rows": chunk_rows, "center_on": center_on}
    assert_equals_reference(problem(shape, scales=scales, device=device) | options)


def test_the_reference_of_scales_is_weight_norm() -> None:
    arguments = problem(SHAPE, scales=True)
    made = dict(arguments)
    for whose in ("student", "teacher"):
        scale, v = made.pop(f"{whose}_scale"), arguments[f"{whose}_prototypes"]
        made[f"{whose}_prototypes"] = torch._weight_norm(v, scale[:, None], 0)
    names = ("student_prototypes", "student_scale")
    want, got = reference(made)[0], reference(arguments)[0]
    torch.testing.assert_close(got, want)
    leaves = [arguments[name] for name in names]
    torch.testing.assert_close(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves))


@pytest.mark.parametrize("absent", ["student_scale", "teacher_scale"])
@pytest.mark.parametrize("same_position", [True, False])
def test_scales_of_one_side_only(same_position: bool, absent: str) -> None:
    arguments = problem((5, 5, 13, 3, 1), scales=True) | {absent: None}
    assert_equals_reference(arguments | {"targets": None} if same_position else arguments)


def test_the_gradient_of_directions_does_not_depend_on_how_many_are_worked_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmf_heads._weight_norm._BLOCK", 4 * 3)  # 13 prototypes: three blocks of 4, and one over
    assert_equals_reference(problem(SHAPE, scales=True))


def test_a_direction_of_length_zero_has_no_prototype() -> None:
    """As in weight_norm, whose 0 / 0 is NaN."""
    arguments = problem(SHAPE, scales=True)
    with torch.no_grad():
        arguments["student_prototypes"][3] = 0
    assert prototype_cross_entropy(**arguments)[0].isnan()
    assert reference(arguments)[0].isnan()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("center_on", ["scores", "responsibilities"])
@pytest.mark.parametrize("chunk_rows", [1, 3, None])
@pytest.mark.parametrize("weighted", [True, False])
@SCALES
@pytest.mark.parametrize("shape", [(1, 1, 2, 2, 1), (11, 11, 13, 3, 1)], ids=str)
def test_equals_the_reference_at_the_same_position(
    shape: tuple, scales: bool, weighted: bool, chunk_rows: int | None, center_on: str, device: str
) -> None:
    arguments = problem(shape, scales=scales, device=device)
    arguments |= {"targets": None, "chunk_rows": chunk_rows, "center_on": center_on}
    assert_equals_reference(arguments if weighted else arguments | {"weights": None})


OPTIONAL = ["student_log_normalizer", "teacher_log_normalizer", "log_center", "weights"]


@pytest.mark.parametrize("center_on", ["scores", "responsibilities"])
@pytest.mark.parametrize("same_position", [True, False])
@pytest.mark.parametrize("absent", [*([name] for name in OPTIONAL), OPTIONAL], ids="-".join)
def test_optional_arguments(absent: list[str], same_position: bool, center_on: str) -> None:
    arguments = problem((5, 5, 13, 3, 1)) | dict.fromkeys(absent) | {"center_on": center_on}
    assert_equals_reference(arguments | {"targets": None} if same_position else arguments)


@pytest.mark.parametrize("ncrops", [2, 3, 10])
def test_dino_pairs_are_the_loops_of_dino(ncrops: int) -> None:
    batch_size, k = 3, 13
    arguments = problem((ncrops * batch_size, 2 * batch_size, k, 4, 2))
    targets, weights = dino_pairs(batch_size, ncrops)
    y, w, b = (arguments[name] for name in GRADIENTS)
    predictions = (y @ w.T / 0.1 + b).log_softmax(1).chunk(ncrops)
    raw = arguments["teacher_features"] @ arguments["teacher_prototypes"].T / 0.04
    teacher = (raw + arguments["teacher_log_normalizer"] - arguments["log_center"]).softmax(1).chunk(2)
    terms = [-(teacher[u] * predictions[v]).sum(1).mean() for u in range(2) for v in range(ncrops) if u != v]
    arguments |= {"targets": targets, "weights": weights}
    torch.testing.assert_close(prototype_cross_entropy(**arguments)[0], sum(terms) / len(terms))
    assert_equals_reference(arguments)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("same_position", [True, False])
def test_gradients_are_those_of_finite_differences(same_position: bool, reduction: str) -> None:
    arguments = problem((3, 3, 5, 2, 1), scales=True) | {"reduction": reduction, "chunk_rows": 2}
    if same_position:
        arguments["targets"] = None

    def loss(*inputs: torch.Tensor) -> torch.Tensor:
        return prototype_cross_entropy(**arguments | dict(zip(SCALED_GRADIENTS, inputs, strict=True)))[0]

    assert torch.autograd.gradcheck(loss, [arguments[name] for name in SCALED_GRADIENTS])


def test_the_upstream_gradient_scales_all_gradients() -> None:
    arguments = problem(SHAPE)
    loss = prototype_cross_entropy(**arguments)[0]
    plain = gradients(loss, arguments, retain_graph=True)
    scaled = gradients(65536.0 * loss, arguments)
    torch.testing.assert_close(scaled, {name: 65536.0 * gradient for name, gradient in plain.items()})


def test_per_row_losses_meet_a_gradient_each() -> None:
    arguments = problem(SHAPE, scales=True)
    upstream = torch.randn(7, dtype=torch.float64)
    losses = prototype_cross_entropy(**arguments, reduction="none")[0]
    assert losses.shape == (7,)
    expected = reference(arguments | {"weights": arguments["weights"] * upstream[:, None]})[0]
    torch.testing.assert_close(losses @ upstream, expected)
    torch.testing.assert_close(gradients(losses @ upstream, arguments), gradients(expected, arguments))
    for i, row_loss in enumerate(losses):
        only = torch.zeros(7, 1, dtype=torch.float64)
        only[i] = 1
        torch.testing.assert_close(row_loss, reference(arguments | {"weights": arguments["weights"] * only})[0])


def test_per_row_losses_without_weights_or_targets() -> None:
    arguments = problem((5, 5, 13, 3, 1)) | {"targets": None, "weights": None}
    upstream = torch.randn(5, dtype=torch.float64)
    losses = prototype_cross_entropy(**arguments, reduction="none")[0]
    expected = reference(arguments | {"weights": upstream[:, None]})[0]
    torch.testing.assert_close(gradients(losses @ upstream, arguments), gradients(expected, arguments))


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_gradients_accumulate_over_backward_calls(reduction: str) -> None:
    arguments = problem(SHAPE, scales=True)
    leaves = [arguments[name] for name in SCALED_GRADIENTS]
    loss = prototype_cross_entropy(**arguments, reduction=reduction)[0].sum()
    once = gradients(loss, arguments, retain_graph=True)
    loss.backward(retain_graph=True)
    loss.backward(torch.tensor(2.0, dtype=torch.float64))
    torch.testing.assert_close([leaf.grad for leaf in leaves], [3 * gradient for gradient in once.values()])


@pytest.mark.parametrize("name", ["teacher_features", "teacher_prototypes", "teacher_scale", "weights"])
def test_a_teacher_that_moves_before_the_backward_of_per_row_losses_is_an_error(name: str) -> None:
    """That pass starts again from the inputs: with others its gradients would be of another loss."""
    arguments = problem(SHAPE, scales=True)
    loss = prototype_cross_entropy(**arguments, reduction="none")[0].sum()
    arguments[name].mul_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_per_row_losses_of_a_teacher_in_inference_mode() -> None:
    arguments = problem(SHAPE)
    with torch.inference_mode():
        arguments["teacher_features"] = arguments["teacher_features"].clone()
    loss = prototype_cross_entropy(**arguments, reduction="none")[0].sum()
    torch.testing.assert_close(gradients(loss, arguments), gradients(reference(arguments)[0], arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("same_position", [True, False])
def test_log_normalizers_of_another_dtype(same_position: bool, dtype: torch.dtype) -> None:
    other = torch.float64 if dtype == torch.float32 else torch.float32
    arguments = problem((5, 5, 13, 3, 1), dtype=dtype)
    for name in ("student_log_normalizer", "teacher_log_normalizer", "log_center"):
        arguments[name] = arguments[name].detach().to(other).requires_grad_(name.startswith("student"))
    if same_position:
        arguments["targets"] = None
    loss = prototype_cross_entropy(**arguments)[0]
    assert loss.dtype == dtype
    expected = reference(arguments)[0]
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients(loss, arguments), gradients(expected, arguments), rtol=1e-4, atol=1e-5)


def test_micro_batches_sum_to_the_batch() -> None:
    arguments = problem((8, 4, 13, 3, 2))
    whole = gradients(prototype_cross_entropy(**arguments)[0], arguments)
    for rows in (slice(0, 5), slice(5, 8)):
        part = {name: arguments[name][rows] for name in ("student_features", "targets", "weights")}
        prototype_cross_entropy(**arguments | part)[0].backward()
    torch.testing.assert_close({name: arguments[name].grad for name in GRADIENTS}, whole)


def test_nothing_flows_to_the_teacher_or_the_statistics() -> None:
    arguments = problem(SHAPE, scales=True)
    teacher = ["teacher_features", "teacher_prototypes", "teacher_scale", "teacher_log_normalizer", "log_center"]
    for name in teacher:
        arguments[name].requires_grad_()
    loss, log_sum, _ = prototype_cross_entropy(**arguments)
    assert not log_sum.requires_grad
    loss.backward()
    assert all(arguments[name].grad is None for name in teacher)


def test_no_grad() -> None:
    arguments = problem(SHAPE)
    with torch.no_grad():
        loss = prototype_cross_entropy(**arguments)[0]
    assert not loss.requires_grad
    torch.testing.assert_close(loss, reference(arguments)[0].detach())


LAST_LAYER = ["student_prototypes", "student_scale"]


@pytest.mark.parametrize(
    "frozen",
    [[name] for name in SCALED_GRADIENTS] + [LAST_LAYER, list(SCALED_GRADIENTS[1:]), list(SCALED_GRADIENTS)],
    ids="-".join,
)
@pytest.mark.parametrize("same_position", [True, False])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_frozen_inputs_change_no_other_gradient(frozen: list[str], same_position: bool, reduction: str) -> None:
    arguments = problem((5, 5, 13, 3, 1), scales=True) | ({"targets": None} if same_position else {})
    for name in frozen:
        arguments[name].requires_grad_(False)
    loss = prototype_cross_entropy(**arguments, reduction=reduction)[0].sum()
    if len(frozen) == 4:
        assert not loss.requires_grad
    else:
        torch.testing.assert_close(gradients(loss, arguments), gradients(reference(arguments)[0], arguments))


class Products(TorchDispatchMode):
    """Counts the multiplications of all matrix products."""

    multiplications = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            left, right = args[-2:]
            self.multiplications += left.shape[0] * left.shape[1] * right.shape[1]
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("same_position", "frozen", "per_row"),
    [
        (False, [], 3 * 31 + 3 * 11),
        (False, ["student_scale"], 3 * 31 + 3 * 11),
        (False, LAST_LAYER, 2 * 31 + 2 * 11),
        (False, ["student_features"], 2 * 31 + 3 * 11),
        (False, ["student_features", *LAST_LAYER], 31 + 2 * 11),
        (True, [], 4 * 31),
        (True, LAST_LAYER, 3 * 31),
        (True, ["student_features", *LAST_LAYER], 2 * 31),
    ],
)
def test_number_of_products(same_position: bool, frozen: list[str], per_row: int) -> None:
    arguments = problem((31, 31 if same_position else 11, 101, 17, 1), scales=True)
    if same_position:
        arguments["targets"] = None
    arguments["student_log_normalizer"] = None  # its products are vectors
    for name in frozen:
        arguments[name].requires_grad_(False)

    with Products() as products:
        loss = prototype_cross_entropy(**arguments, chunk_rows=3)[0]
        if loss.requires_grad:
            loss.backward()
    assert products.multiplications == per_row * 101 * 17


def test_strides_do_not_matter() -> None:
    arguments = problem((6, 6, 13, 4, 2), scales=True)
    strided = {
        name: value.detach().repeat_interleave(2, dim=-1)[..., ::2].requires_grad_(value.requires_grad)
        if torch.is_tensor(value)
        else value
        for name, value in arguments.items()
    }
    strided["student_prototypes"] = arguments["student_prototypes"].detach().T.contiguous().T.requires_grad_()
    assert not strided["student_features"].is_contiguous()
    assert not strided["student_prototypes"].is_contiguous()
    assert_equals_reference(strided)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # the tracer itself does so
@pytest.mark.parametrize("same_position", [True, False])
def test_compiles_without_a_graph_break(same_position: bool) -> None:
    arguments = problem((7, 7, 13, 3, 1), scales=True) | {"chunk_rows": 6}
    if same_position:
        arguments["targets"] = None

    def loss(y: torch.Tensor) -> torch.Tensor:
        return prototype_cross_entropy(**arguments | {"student_features": y})[0]

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(arguments["student_features"])
    expected = reference(arguments)[0]
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(gradients(compiled, arguments), gradients(expected, arguments))


def test_per_row_backward_does_not_see_autocast():
    torch.manual_seed(0)
    y = torch.nn.functional.normalize(torch.randn(6, 8), dim=1).requires_grad_()
    w = torch.randn(30, 8)
    loss, _, _ = prototype_cross_entropy(
        y, w, y.detach(), w, student_temperature=0.1, teacher_temperature=0.05, reduction="none"
    )
    (plain,) = torch.autograd.grad(loss.sum(), y, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        (under_autocast,) = torch.autograd.grad(loss.sum(), y)
    torch.testing.assert_close(under_autocast, plain, rtol=0, atol=0)


def test_batched_and_fake_gradients():
    y, w = torch.randn(6, 8, requires_grad=True), torch.randn(9, 8, requires_grad=True)

    def loss() -> torch.Tensor:
        temperatures = {"student_temperature": 0.1, "teacher_temperature": 0.05}
        return prototype_cross_entropy(y, w, y.detach(), w.detach(), **temperatures)[0]

    (single,) = torch.autograd.grad(loss(), y)
    (batched,) = torch.autograd.grad(loss(), y, torch.tensor([1.0, 2.0]), is_grads_batched=True)
    torch.testing.assert_close(batched, torch.stack([single, 2 * single]))
    with FakeTensorMode():
        y, w = torch.randn(6, 8, requires_grad=True), torch.randn(9, 8, requires_grad=True)
        loss().backward()
        assert w.grad.shape == (9, 8)
