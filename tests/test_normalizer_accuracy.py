"""log_vmf_normalizer, vmf_mean_resultant and their derivatives against the exact values of tests/data."""

import math

import numpy as np
import pytest
import torch
from benchmarks.normalizer.truth import Exact, Truth, load_truth
from torch import Tensor

from vmf_heads import log_vmf_normalizer, vmf_mean_resultant

DTYPES = [torch.float32, torch.float64]
TRUTH = load_truth()
BOUND = 4.0  # eps; of the value and of the mean resultant, everywhere


def slope_bound(p: int, dtype: torch.dtype) -> float:
    """What is promised of dA/dkappa, in eps; in low dimensions float64 needs many steps down in order."""
    return 8.0 if dtype == torch.float64 and p < 24 else 4.0


def assert_accurate(got: Tensor, exact: Exact, truth: Truth, bound: float) -> None:
    """At most `bound` eps where the exact value is a normal number of the dtype, an absolute `tiny` below that."""
    values = got.detach().numpy()
    limits = np.finfo(values.dtype)
    error = np.abs(exact.error(values, values.dtype))
    subnormal = np.abs(values.astype(np.float64) - exact.high) <= float(limits.tiny)
    right = np.isfinite(values) & np.where(exact.normal(values.dtype), error <= bound, subnormal)
    report = [
        f"p={truth.p} kappa={truth.kappa[i]} {values.dtype}: {values[i]} for {exact.high[i]}, {error[i]:.1f} eps off"
        for i in np.flatnonzero(~right)
    ]
    assert not report, "\n".join(report)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", TRUTH)
def test_value_and_both_derivatives(p, dtype):
    truth = TRUTH[p]
    kappa = torch.tensor(truth.kappa, dtype=dtype, requires_grad=True)
    value = log_vmf_normalizer(kappa, p, relative=True)
    (first,) = torch.autograd.grad(value.sum(), kappa, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), kappa)
    assert_accurate(value, truth.log_c_relative, truth, BOUND)
    assert_accurate(-first, truth.mean_resultant, truth, BOUND)
    assert_accurate(-second, truth.slope, truth, slope_bound(p, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", TRUTH)
def test_mean_resultant_and_its_derivative(p, dtype):
    truth = TRUTH[p]
    kappa = torch.tensor(truth.kappa, dtype=dtype, requires_grad=True)
    resultant = vmf_mean_resultant(kappa, p)
    (slope,) = torch.autograd.grad(resultant.sum(), kappa)
    assert_accurate(resultant, truth.mean_resultant, truth, BOUND)
    assert_accurate(slope, truth.slope, truth, slope_bound(p, dtype))
    assert (slope > 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", TRUTH)
def test_absolute_value_adds_only_the_rounding_of_the_constant(p, dtype):
    truth, eps = TRUTH[p], torch.finfo(dtype).eps
    got = log_vmf_normalizer(torch.tensor(truth.kappa, dtype=dtype), p).double().numpy()
    constant, value = abs(truth.log_c.high[0]), np.abs(truth.log_c.high)
    # The constant is a difference of these two, taken in float64.
    parts = math.lgamma(p / 2) + p / 2 * math.log(math.pi)
    allowed = eps * (BOUND * np.abs(truth.log_c_relative.high) + (constant + value) / 2) + 2.0**-51 * parts
    error = np.abs(got - truth.log_c.high)
    worst = int(np.argmax(error / allowed))
    assert error[worst] <= allowed[worst], (p, truth.kappa[worst], got[worst], truth.log_c.high[worst])


# torch's own: its compiler imports modules that still script.
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("how", ["own kernel", "in a compiled region"])
@pytest.mark.parametrize(
    ("p", "dtype"),
    [
        (256, torch.float32),
        *(pytest.param(p, dtype, marks=pytest.mark.slow) for p in (2, 17, 1_000_000) for dtype in DTYPES),
        pytest.param(256, torch.float64, marks=pytest.mark.slow),
    ],
)
def test_one_kernel_is_as_accurate(p, dtype, how):
    def value_and_resultant(kappa: Tensor) -> tuple[Tensor, Tensor]:
        options = {"compiled": True if how == "own kernel" else None}
        return log_vmf_normalizer(kappa, p, relative=True, **options), vmf_mean_resultant(kappa, p, **options)

    truth = TRUTH[p]
    in_a_region = how == "in a compiled region"
    function = torch.compile(value_and_resultant, fullgraph=True) if in_a_region else value_and_resultant
    kappa = torch.tensor(truth.kappa, dtype=dtype, requires_grad=True)
    value, resultant = function(kappa)
    (gradient,) = torch.autograd.grad(value.sum(), kappa)
    (slope,) = torch.autograd.grad(function(kappa)[1].sum(), kappa)  # a compiled graph goes backward once
    assert_accurate(value, truth.log_c_relative, truth, BOUND)
    assert_accurate(resultant, truth.mean_resultant, truth, BOUND)
    assert_accurate(-gradient, truth.mean_resultant, truth, BOUND)
    assert_accurate(slope, truth.slope, truth, slope_bound(p, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dimension_follows_from_a_higher_one(dtype):
    """The dimensions between those of the table, from float64 six dimensions up: other coefficients, another order.

    0F1(; b; z) and A step down by positive terms (DLMF 10.29.1), so the comparison is good to a few roundings.
    """
    kappa = torch.cat([torch.logspace(-6, 8, 57), torch.linspace(1, 60, 30)]).double()
    for p in range(2, 601):
        value, resultant = log_vmf_normalizer(kappa, p + 6, relative=True), vmf_mean_resultant(kappa, p + 6)
        for q in (p + 4, p + 2, p):
            value = value - torch.log1p(kappa * resultant / q)
            resultant = kappa / (q + kappa * resultant)
        got = (log_vmf_normalizer(kappa.to(dtype), p, relative=True), vmf_mean_resultant(kappa.to(dtype), p))
        for name, ours, want in zip(("D", "A"), got, (value, resultant), strict=True):
            error = ((ours.double() - want) / want).abs().max().item() / torch.finfo(dtype).eps
            assert error <= 2 * BOUND, f"p={p} {name}: {error:.1f} eps"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [2, 3, 16, 17, 256, 1_000_000])
def test_zero_is_exact(p, dtype):
    zero = torch.zeros((), dtype=dtype)
    assert log_vmf_normalizer(zero, p, relative=True) == 0
    assert vmf_mean_resultant(zero, p) == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [2, 3, 16, 17, 256, 1_000_000])
def test_outside_the_domain(p, dtype):
    kappa = torch.tensor([-1.0, -1e-30, -math.inf, math.nan, math.inf], dtype=dtype, requires_grad=True)
    value, resultant = log_vmf_normalizer(kappa, p), vmf_mean_resultant(kappa, p)
    (slope,) = torch.autograd.grad(resultant.sum(), kappa)
    for result in (value, resultant, slope):
        assert result[:4].isnan().all()
    assert value[4] == -math.inf
    assert resultant[4] == 1
    assert 0 <= slope[4] < 1e-24


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [2, 3, 16, 17, 256, 1_000_000])
def test_finite_up_to_the_largest_float(p, dtype):
    kappa = torch.logspace(9.5, math.log10(torch.finfo(dtype).max) - 0.1, 400, dtype=dtype)
    value, resultant = log_vmf_normalizer(kappa, p, relative=True), vmf_mean_resultant(kappa, p)
    assert value.isfinite().all()
    assert (value.diff() < 0).all()
    # 1 - (p-1)/(2 kappa) is the beginning of the series for large kappa.
    torch.testing.assert_close(resultant, 1 - (p - 1) / 2 / kappa, rtol=3e-7, atol=0)
    assert (resultant <= 1).all()
