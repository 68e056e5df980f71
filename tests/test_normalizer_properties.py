"""What is true of the exact functions for every p and kappa, checked on random ones in float64."""

import math

import numpy as np
import scipy.special
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from vmf_heads import log_vmf_normalizer, vmf_mean_resultant

EPS = torch.finfo(torch.float64).eps
SLACK = 64 * EPS  # a few roundings on either side of an exact (in)equality

# The same examples in every run, however slow the machine is.
few = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
# Dimensions and concentrations spread evenly over the orders of magnitude, which is where the behaviour changes.
dimensions = st.one_of(st.integers(2, 20), st.integers(2, 1200), st.integers(2, 1_000_000))
concentrations = st.floats(-6, 8).map(lambda exponent: 10.0**exponent)


def at(kappa: float) -> Tensor:
    return torch.tensor(kappa, dtype=torch.float64)


def value(kappa: float, p: int) -> float:
    return log_vmf_normalizer(at(kappa), p, relative=True).item()


def resultant(kappa: float, p: int) -> float:
    return vmf_mean_resultant(at(kappa), p).item()


def slope(kappa: float, p: int) -> float:
    k = at(kappa).requires_grad_()
    return torch.autograd.grad(vmf_mean_resultant(k, p), k)[0].item()


@few
@given(dimensions, concentrations, st.floats(-12, 2).map(lambda exponent: 1 + 10.0**exponent))
def test_value_falls_and_resultant_rises(p, kappa, factor):
    larger = kappa * factor
    assert value(larger, p) <= value(kappa, p) * (1 - SLACK)
    assert 0 < resultant(kappa, p) * (1 - SLACK) <= resultant(larger, p) <= 1


@few
@given(dimensions, concentrations, st.floats(-3, 2).map(lambda exponent: 1 + 10.0**exponent))
def test_value_is_minus_the_integral_of_the_resultant(p, kappa, factor):
    # A rises, so its integral lies between those of its two end values.
    larger = kappa * factor
    fall = value(kappa, p) - value(larger, p)
    rounding = SLACK * abs(value(larger, p))
    assert (
        (larger - kappa) * resultant(kappa, p) - rounding <= fall <= (larger - kappa) * resultant(larger, p) + rounding
    )


@few
@given(dimensions, concentrations)
@example(2, 1e-6)
def test_recurrence_in_the_dimension(p, kappa):
    """1 / A_p(kappa) = A_{p+2}(kappa) + p / kappa, DLMF 10.29.1."""
    assert math.isclose(resultant(kappa, p) * (p + kappa * resultant(kappa, p + 2)), kappa, rel_tol=SLACK)


@few
@given(dimensions, concentrations)
def test_resultant_lies_between_the_bounds_of_amos(p, kappa):
    """kappa / (a + sqrt(kappa^2 + b^2)) with a = (p-1)/2 and b = (p+1)/2 below, (p-1)/2 above; Amos 1974."""
    lower = kappa / ((p - 1) / 2 + math.hypot(kappa, (p + 1) / 2))
    upper = kappa / ((p - 1) / 2 + math.hypot(kappa, (p - 1) / 2))
    assert lower * (1 - SLACK) <= resultant(kappa, p) <= upper * (1 + SLACK)


@few
@given(dimensions, concentrations)
def test_turan_inequality(p, kappa):
    """I_nu^2 > I_{nu-1} I_{nu+1}: the resultant falls with the dimension."""
    assert resultant(kappa, p + 2) <= resultant(kappa, p) * (1 + SLACK)


@few
@given(dimensions, concentrations)
def test_slope_is_positive_and_below_the_chord(p, kappa):
    """A is concave with A(0) = 0 and A'(0) = 1/p, so 0 < A' <= A / kappa <= 1/p."""
    assert 0 < slope(kappa, p) <= resultant(kappa, p) / kappa * (1 + SLACK) <= 1 / p * (1 + SLACK) ** 2


@few
@given(dimensions, concentrations)
def test_riccati_equation(p, kappa):
    """A' + A^2 + (p-1) A / kappa = 1, a sum of positive terms."""
    a = resultant(kappa, p)
    assert math.isclose(slope(kappa, p) + a * a + (p - 1) * a / kappa, 1, rel_tol=SLACK)


@few
@given(concentrations)
def test_closed_form_in_three_dimensions(kappa):
    """log C_3(kappa) = log(kappa / (4 pi sinh(kappa)))."""
    log_sinh = kappa + math.log(-math.expm1(-2 * kappa) / 2)
    want = math.log(kappa) - log_sinh - math.log(4 * math.pi)
    got = log_vmf_normalizer(at(kappa), 3).item()
    assert math.isclose(got, want, rel_tol=SLACK, abs_tol=SLACK * (1 + kappa + abs(math.log(kappa))))


@few
@given(st.integers(2, 1024), st.floats(-1, 4).map(lambda exponent: 10.0**exponent))
@example(256, 10.0)
def test_scipy_where_it_is_finite(p, kappa):
    order = p / 2 - 1
    scaled, next_scaled = scipy.special.ive(order, kappa), scipy.special.ive(order + 1, kappa)
    assume(min(scaled, next_scaled) > 1e-290)  # below, SciPy has lost digits to gradual underflow, or everything
    terms = np.array([order * math.log(kappa), -p / 2 * math.log(2 * math.pi), -math.log(scaled), -kappa])
    assert math.isclose(
        log_vmf_normalizer(at(kappa), p).item(), terms.sum(), rel_tol=0, abs_tol=1e-12 + 16 * EPS * np.abs(terms).sum()
    )
    assert math.isclose(resultant(kappa, p), next_scaled / scaled, rel_tol=1e-9)
