"""A gradient that cannot be differentiated again says so; one that can is right."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import grad, gradgradcheck
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint

from cross_entropy_problems import head_output, problem
from dino_models import NCROPS, crops, dino_loss, models
from test_cross_entropy import SAME_POSITION
from vmf_heads import HeadOutput, prototype_cross_entropy
from vmf_heads._matmul import linear_float32
from vmf_heads.cross_entropy import prototype_cross_entropy_reference
from vmf_heads.prototypes import weight_norm

FUSED = "a gradient of `prototype_cross_entropy`.* was taken with create_graph=True"
TEMPERATURES = {"student_temperature": 0.1, "teacher_temperature": 0.05, "normalizer": "none"}


def called(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    return function(*tensors)


def checkpointed(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    return checkpoint(function, *tensors, use_reentrant=False)


@pytest.mark.parametrize("call", [called, checkpointed])
@SAME_POSITION
def test_a_penalty_on_the_fused_gradient_raises(same_position: bool, call: Callable[..., Tensor]) -> None:
    """The gradient that arrives is a constant 1: torch's own `once_differentiable` would let this pass in silence."""
    arguments = problem((5, 5, 13, 3, 1), scales=True, same_position=same_position)

    def loss(*student: Tensor) -> Tensor:
        return prototype_cross_entropy(**arguments | {"student": HeadOutput(*student)})[0]

    student = arguments["student"]
    for function in (Tensor.clone, Tensor.square):  # of a square the gradient that arrives depends on the loss
        with pytest.raises(RuntimeError, match=FUSED):
            grad(function(call(loss, *student)), student.features, create_graph=True)
    with pytest.raises(RuntimeError, match=FUSED):
        call(loss, *student).backward(create_graph=True)
    call(loss, *student).backward()  # the first derivative stays


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # the tracer itself does so
def test_a_penalty_on_the_compiled_gradient_raises() -> None:
    student, teacher = (head_output(5, 13, 3, requires_grad=True, dtype=torch.float64) for _ in "st")

    def loss(features: Tensor) -> Tensor:
        features = normalize(features, dim=1)
        output = HeadOutput(features, student.directions, student.scales)
        return prototype_cross_entropy(output, teacher, **TEMPERATURES)[0]

    torch._dynamo.reset()
    value = torch.compile(loss, fullgraph=True, backend="aot_eager")(student.features)
    (gradient,) = grad(value, student.features, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        (value + gradient.square().sum()).backward()


def test_a_penalty_on_half_precision_scores_raises() -> None:
    """On the CPU only parameters in half precision lead there; on CUDA autocast does."""
    features, weight = torch.randn(5, 3, requires_grad=True), torch.randn(7, 3).bfloat16().requires_grad_()
    with pytest.raises(RuntimeError, match="half-precision products was taken with create_graph=True"):
        grad(linear_float32(features, weight).sum(), features, create_graph=True)


def test_a_penalty_on_the_gradient_of_a_fused_loss_raises_and_of_the_other_is_right() -> None:
    """The advice of the message, fused=False: its penalty's gradient against finite differences."""
    for fused in (True, False):
        torch.manual_seed(3)
        student, teacher = (model.double() for model in models())
        loss = dino_loss(fused=fused).double()
        loss.attach(student, teacher)
        x = crops(2).double()
        with torch.no_grad():
            targets = teacher(x[: 2 * len(x) // NCROPS])
        norms = student.head.last_layer.weight_g

        def penalty(student=student, loss=loss, x=x, targets=targets) -> Tensor:
            value = loss(student(x), targets, 0, commit=False)
            return sum(g.square().sum() for g in grad(value, list(student.parameters()), create_graph=True))

        if fused:
            with pytest.raises(RuntimeError, match=FUSED):
                penalty()
            continue
        got = grad(penalty(), norms)[0][3].item()
        ends = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                norms[3] += step
            ends.append(penalty().item())
            with torch.no_grad():
                norms[3] -= step
        assert got == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5)
        assert abs(got) > 1e-6


@pytest.mark.parametrize("scales", [False, True])
def test_the_reference_can_be_differentiated_twice(scales: bool) -> None:
    """With scales through weight_norm, whose kernel in torch 2.13 has a wrong second derivative."""
    arguments = problem((2, 2, 3, 2, 1), scales=scales)
    if scales:
        arguments["student"].scales.data.abs_().add_(0.5)
    student = tuple(tensor for tensor in arguments["student"] if tensor is not None)

    def loss(features: Tensor, directions: Tensor, scales: Tensor | None = None) -> Tensor:
        student = HeadOutput(features, directions, scales)
        return prototype_cross_entropy_reference(**arguments | {"student": student})[0]

    assert gradgradcheck(loss, student)


@pytest.mark.parametrize("transform", [torch.func.hessian, lambda f: torch.func.jacrev(torch.func.jacrev(f))])
def test_weight_norm_under_transforms(transform: Callable[..., Callable[..., Tensor]]) -> None:
    v, g, x = torch.randn(4, 3).double(), torch.rand(4).double(), torch.randn(4, 3).double()

    def by_hand(v: Tensor) -> Tensor:
        return (x * v * g[:, None] / v.norm(dim=1, keepdim=True)).square().sum()

    def value(v: Tensor) -> Tensor:
        return (x * weight_norm(v, g)).square().sum()

    torch.testing.assert_close(transform(value)(v), torch.autograd.functional.hessian(by_hand, v))
