"""vmf_concentration against the exact values of tests/data, and every way of differentiating and compiling it."""

import math

import numpy as np
import pytest
import torch
from benchmarks.concentration.truth import Truth, load_truth
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from vmf_heads import vmf_mean_resultant
from vmf_heads.mixture import vmf_concentration

DTYPES = [torch.float32, torch.float64]
TRUTH = load_truth()
BOUND = 4.0  # eps, of kappa everywhere
SLOPE_BOUND = 8.0  # eps, of dkappa/dR: twice kappa's error near R = 1, and that of A'


def assert_accurate(name: str, got: np.ndarray, exact, sign: int, truth: Truth, bound: float) -> None:
    """At most `bound` eps where the exact value is a normal number of the dtype, inf where it exceeds the dtype."""
    largest = float(np.finfo(got.dtype).max)
    error = np.abs(exact.error(sign * got, got.dtype))
    right = np.where(exact.normal(got.dtype), error <= bound, np.abs(got) <= 1e-37)
    right = np.where(exact.high > largest, sign * got == np.inf, right & np.isfinite(got))
    report = [
        f"{name}: p={truth.p} {truth.given}={truth.argument[i]} {got.dtype}: {got[i]} for {exact.high[i]}"
        for i in np.flatnonzero(~right)
    ]
    assert not report, "\n".join(report)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given", ["resultant", "complement"])
def test_kappa_and_its_derivative(given, dtype):
    for (_, kind), truth in TRUTH.items():
        if kind == given:
            argument = torch.tensor(truth.argument, dtype=dtype, requires_grad=True)
            kappa = vmf_concentration(argument, truth.p, complement=given == "complement")
            (slope,) = torch.autograd.grad(kappa.sum(), argument)
            assert kappa.dtype == dtype
            assert_accurate("kappa", kappa.detach().numpy(), truth.kappa, 1, truth, BOUND)
            sign = -1 if given == "complement" else 1
            assert_accurate("slope", slope.numpy(), truth.slope, sign, truth, SLOPE_BOUND)


@pytest.mark.parametrize("p", [2, 3, 4, 16, 17, 33, 256, 1_000_000])
def test_it_inverts_the_mean_resultant(p):
    """Between the points of the table, as far as the condition number of A lets kappa be seen in it."""
    kappa = torch.logspace(-6, math.log10(3e3 * p), 2001, dtype=torch.float64, requires_grad=True)
    resultant = vmf_mean_resultant(kappa, p)
    (slope,) = torch.autograd.grad(resultant.sum(), kappa)
    condition = (resultant / (kappa * slope)).detach()
    error = (vmf_concentration(resultant.detach(), p) / kappa.detach() - 1).abs() / torch.finfo(torch.float64).eps
    assert (error <= BOUND + 2 * condition).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, *DTYPES])
@pytest.mark.parametrize("p", [2, 3, 17, 256, 1_000_000])
def test_the_ends_are_exact_and_beyond_them_is_nothing(p, dtype):
    resultant = torch.tensor([0.0, 1.0, -1e-3, 1.5, math.nan], dtype=dtype)
    kappa = vmf_concentration(resultant, p)
    assert kappa.dtype == dtype
    assert kappa[:2].tolist() == [0.0, math.inf]
    assert kappa[2:].isnan().all()
    assert vmf_concentration(1 - resultant[:2], p, complement=True).tolist() == [0.0, math.inf]
    x = resultant[:2].clone().requires_grad_()
    (slope,) = torch.autograd.grad(vmf_concentration(x, p).sum(), x)
    assert slope.tolist() == [torch.tensor(float(p), dtype=dtype).item(), math.inf]


def test_a_tiny_complement_gives_kappa_up_to_the_largest_float():
    rest = torch.tensor([1e-300, 1e-308, 1e-315], dtype=torch.float64, requires_grad=True)
    kappa = vmf_concentration(rest, 3, complement=True)
    assert kappa.tolist()[:2] == pytest.approx([1e300, 1e308], rel=1e-15)
    assert kappa[2] == math.inf
    assert not torch.autograd.grad(kappa.sum(), rest)[0].isnan().any()


ARGUMENT = [1e-4, 0.05, 0.3, 0.6, 0.95, 0.999]
FIRST = {
    "backward": lambda f, x: torch.autograd.grad(f(x).sum(), x)[0],
    "vmap(grad)": lambda f, x: vmap(grad(f))(x),
    "jacrev": lambda f, x: jacrev(f)(x).diagonal(),
    "jacfwd": lambda f, x: jacfwd(f)(x).diagonal(),
    "jvp": lambda f, x: jvp(f, (x,), (torch.ones_like(x),))[1],
}
SECOND = {
    "double backward": lambda f, x: torch.autograd.grad(
        torch.autograd.grad(f(x).sum(), x, create_graph=True)[0].sum(), x
    )[0],
    "hessian": lambda f, x: hessian(lambda y: f(y).sum())(x).diagonal(),
    "vmap(grad(grad))": lambda f, x: vmap(grad(grad(f)))(x),
}


def arguments() -> torch.Tensor:
    return torch.tensor(ARGUMENT, dtype=torch.float64, requires_grad=True)


def implicit(p: int) -> tuple[torch.Tensor, torch.Tensor]:
    """1 / A' at kappa(R), and its derivative by central differences of it."""

    def slope(x):
        kappa = vmf_concentration(x, p).detach().requires_grad_()
        return 1 / torch.autograd.grad(vmf_mean_resultant(kappa, p).sum(), kappa)[0]

    x = arguments().detach()
    h = 1e-5 * torch.minimum(x, 1 - x)
    return slope(x), (slope(x + h) - slope(x - h)) / (2 * h)


@pytest.mark.parametrize("complement", [False, True])
@pytest.mark.parametrize("p", [2, 3, 256])
@pytest.mark.parametrize("transform", FIRST)
def test_first_derivatives(transform, p, complement):
    want = implicit(p)[0]
    x = (1 - arguments().detach() if complement else arguments().detach()).requires_grad_()
    got = FIRST[transform](lambda y: vmf_concentration(y, p, complement=complement), x)
    torch.testing.assert_close(got, -want if complement else want, rtol=1e-10, atol=0)


@pytest.mark.parametrize("p", [2, 3, 256])
@pytest.mark.parametrize("transform", SECOND)
def test_second_derivatives(transform, p):
    got = SECOND[transform](lambda y: vmf_concentration(y, p), arguments())
    torch.testing.assert_close(got, implicit(p)[1], rtol=1e-4, atol=1e-3 * p)


# torch's own: its compiler imports modules that still script.
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("p", [256, pytest.param(17, marks=pytest.mark.slow)])
def test_a_compiled_region_gives_the_same(p):
    region = torch.compile(lambda x: vmf_concentration(x, p), fullgraph=True, backend="aot_eager")
    x, y = arguments(), arguments()
    kappa, want = region(x), vmf_concentration(y, p)
    torch.testing.assert_close(kappa, want, rtol=1e-15, atol=0)
    torch.testing.assert_close(
        *(torch.autograd.grad(k.sum(), z)[0] for k, z in ((kappa, x), (want, y))), rtol=1e-14, atol=0
    )


def test_vmap_over_rows():
    x = arguments().detach().expand(3, -1)
    torch.testing.assert_close(vmap(lambda row: vmf_concentration(row, 2))(x), vmf_concentration(x, 2), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("argument", "p", "error", "message"),
    [
        (torch.tensor([1]), 3, TypeError, r"`mean_resultant` \(of torch.int64\) must be a floating tensor"),
        (0.5, 3, TypeError, r"`mean_resultant` \(of float\) must be a floating tensor"),
        (torch.tensor(0.5), 1, ValueError, r"`p` \(=1\) must be an integer >= 2"),
        (torch.tensor(0.5), 2.5, TypeError, r"`p` \(=2.5\) must be an integer >= 2"),
    ],
)
def test_errors(argument, p, error, message):
    with pytest.raises(error, match=message):
        vmf_concentration(argument, p)
