"""What is true of `prototype_cross_entropy` for every shape and every number, on random ones in float64."""

import math
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from cross_entropy_problems import gradients, learning, problem, reference
from vmf_heads import HeadOutput, prototype_cross_entropy
from vmf_heads.centering import teacher_targets
from vmf_heads.prototypes import prototype_log_normalizer

# The same examples in every run, however slow the machine is.
few = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
LAST = ("features", "directions", "scales")


@st.composite
def problems(draw: st.DrawFn, rows: int = 0) -> dict[str, Any]:
    """Arguments of any shape, also without rows, without targets, with one prototype, in chunks of any size."""
    same_position = draw(st.booleans())
    student_rows = draw(st.integers(rows, 9))
    teacher_rows = student_rows if same_position else draw(st.integers(rows, 9))
    k, p = draw(st.integers(1, 12)), draw(st.integers(2, 9))
    columns = 1 if same_position else draw(st.integers(0, 3))
    torch.manual_seed(draw(st.integers(0, 1000)))
    shape = (student_rows, teacher_rows, k, p, columns)
    made = problem(shape, scales=draw(st.booleans()), same_position=same_position) if teacher_rows else empty(shape)
    return made | {
        "student_temperature": 10.0 ** draw(st.floats(-2, 1)),
        "teacher_temperature": 10.0 ** draw(st.floats(-2, 1)),
        "normalizer": draw(st.sampled_from(["vmf", "none"])),
        "center_on": draw(st.sampled_from(["scores", "responsibilities"])),
        "batch_chunk_size": draw(st.sampled_from([None, 1, 2, 3, 5, 7])),
    }


def empty(shape: tuple[int, int, int, int, int]) -> dict[str, Any]:
    """Without teacher rows no student row has a target."""
    rows, _, k, p, columns = shape
    one = problem((rows, 1, k, p, columns))
    teacher = one["teacher"]._replace(features=one["teacher"].features[:0])
    return one | {"teacher": teacher, "teacher_rows": torch.full((rows, columns), -1)}


def changed(output: HeadOutput, **new: Tensor) -> HeadOutput:
    """With new leaves in the place of some of its tensors."""
    learns = output.features.requires_grad
    return output._replace(**{name: x.detach().requires_grad_(learns) for name, x in new.items()})


def results(arguments: dict[str, Any]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    loss, log_sum, _ = prototype_cross_entropy(**arguments)
    return loss.detach(), log_sum, gradients(loss, arguments)


def assert_equal(got: Any, want: Any) -> None:
    """To the rounding of logits at the coldest temperature drawn here, of norms up to some tens."""
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)


@settings(few, max_examples=150)
@given(problems())
def test_fused_is_plain(arguments: dict[str, Any]) -> None:
    want, *statistics = reference(arguments)
    got = prototype_cross_entropy(**arguments)
    assert_equal(got, (want, *statistics))
    # Without any target the plain loss is a constant; with these terms its gradients are 0 instead of missing.
    connected = want + sum(0 * tensor.sum() for tensor in learning(arguments).values())
    assert_equal(gradients(got[0], arguments), gradients(connected, arguments))


def scaled(arguments: dict[str, Any]) -> bool:
    return arguments["student"].scales is not None


@few
@given(problems(), st.integers(0, 1000))
def test_a_rotation_changes_nothing(arguments: dict[str, Any], seed: int) -> None:
    torch.manual_seed(seed)
    p = arguments["student"].directions.shape[1]
    rotation = torch.linalg.qr(torch.randn(p, p).double())[0]
    rotated = {
        whose: changed(output, features=output.features @ rotation, directions=output.directions @ rotation)
        for whose, output in arguments.items()
        if isinstance(output, HeadOutput)
    }
    want, want_log_sum, of = results(arguments)
    turned = of | {name: of[name] @ rotation for name in ("features", "directions")}
    assert_equal(results(arguments | rotated), (want, want_log_sum, turned))


@few
@given(problems(), st.integers(0, 1000))
def test_the_order_of_prototypes_changes_nothing(arguments: dict[str, Any], seed: int) -> None:
    torch.manual_seed(seed)
    order = torch.randperm(len(arguments["student"].directions))
    permuted = {"log_center": arguments["log_center"][order]}
    for whose in ("student", "teacher"):
        named = arguments[whose]._asdict()
        permuted[whose] = changed(
            arguments[whose], **{name: named[name][order] for name in LAST[1:] if named[name] is not None}
        )
    want, log_sum, of = results(arguments)
    moved = {name: gradient if name == "features" else gradient[order] for name, gradient in of.items()}
    assert_equal(results(arguments | permuted), (want, log_sum[order], moved))


@few
@given(problems(), st.floats(-100, 100))
def test_a_shift_of_all_logits_changes_nothing(arguments: dict[str, Any], shift: float) -> None:
    """A constant on the centre; and, without log C_p, a vector on all prototypes, which shifts all logits of a row."""
    want = results(arguments)
    assert_equal(results(arguments | {"log_center": arguments["log_center"] + shift}), want)
    if scaled(arguments):
        return
    plain = arguments | {"normalizer": "none"}
    want = results(plain)
    vector = torch.linspace(-1, 1, arguments["student"].directions.shape[1]).double()
    moved = {
        whose: changed(plain[whose], directions=plain[whose].directions + vector) for whose in ("student", "teacher")
    }
    assert_equal(results(plain | moved), want)


@few
@given(problems(rows=1), st.integers(0, 9))
def test_the_parts_of_a_batch_sum_to_it(arguments: dict[str, Any], cut: int) -> None:
    """Student rows in two parts, and of the statistics teacher rows in two parts: so ranks and micro-batches do."""
    want, want_log_sum, want_gradients = results(arguments)
    student, teacher = arguments["student"], arguments["teacher"]
    pairs = arguments["teacher_rows"]
    if pairs is None:
        pairs = torch.arange(len(student.features))[:, None]
    total, sums = torch.zeros(()).double(), torch.full_like(want_log_sum, -math.inf)
    for part in (slice(0, cut), slice(cut, None)):
        rows = {"teacher_rows": pairs[part], "weights": arguments["weights"][part]}
        loss = prototype_cross_entropy(
            **arguments | rows | {"student": student._replace(features=student.features[part])}
        )[0]
        loss.backward()
        total = total + loss.detach()
        half = teacher._replace(features=teacher.features[part])
        nothing = {"teacher_rows": torch.full((0, 1), -1), "weights": None}
        none = student._replace(features=student.features[:0])
        log_sum = prototype_cross_entropy(**arguments | nothing | {"student": none, "teacher": half})[1]
        sums = torch.logaddexp(sums, log_sum)
    assert_equal((total, sums), (want, want_log_sum))
    assert_equal({name: getattr(student, name).grad for name in want_gradients}, want_gradients)


@few
@given(problems(rows=1), st.floats(0, 3))
def test_the_loss_is_at_least_the_entropy_of_its_targets(arguments: dict[str, Any], scale: float) -> None:
    """Gibbs' inequality; with equality where student and teacher are the same, at one temperature and no centre."""
    output, temperature = arguments["teacher"], arguments["student_temperature"]
    log_c = prototype_log_normalizer(output.norms, output.directions.shape[1], temperature)
    targets = teacher_targets(
        output.scores(), temperature, log_normalizer=log_c if arguments["normalizer"] == "vmf" else None
    )
    entropy = torch.special.entr(targets).sum()
    same = {
        "student": output,
        "teacher": output,
        "teacher_temperature": temperature,
        "log_center": None,
        "teacher_rows": None,
        "weights": None,
    }
    assert_equal(prototype_cross_entropy(**arguments | same)[0], entropy)
    other = normalize(output.features + scale, dim=1)
    loss = prototype_cross_entropy(**arguments | same | {"student": output._replace(features=other)})[0]
    assert loss >= entropy - 1e-8
