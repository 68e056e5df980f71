"""The Debye polynomials against their published values, Stirling's series and a Bessel function."""

from fractions import Fraction

import mpmath
import pytest

from vmf_heads._debye import Polynomial, _next_debye, debye_log_polynomials, derivative, multiply


def debye(terms: int) -> list[Polynomial]:
    """U_0, ..., U_terms."""
    U: list[Polynomial] = [[Fraction(1)]]
    for _ in range(terms):
        U.append(_next_debye(U[-1]))
    return U


def at(polynomial: Polynomial, t: Fraction) -> Fraction:
    return sum((c * t**power for power, c in enumerate(polynomial)), Fraction(0))


@pytest.mark.parametrize(
    ("k", "denominator", "numerators"),
    [
        (1, 24, {1: 3, 3: -5}),
        (2, 1152, {2: 81, 4: -462, 6: 385}),
        (3, 414720, {3: 30375, 5: -369603, 7: 765765, 9: -425425}),
    ],
)
def test_published_polynomials(k, denominator, numerators):
    """DLMF 10.41.10."""
    assert {power: c for power, c in enumerate(debye(k)[k]) if c} == {
        power: Fraction(numerator, denominator) for power, numerator in numerators.items()
    }


def test_value_at_one_is_stirlings_series():
    """log sum U_i(1)/N^i = log(sqrt(2 pi N) (N/e)^N / Gamma(N+1)) = -sum_k B_2k / (2k (2k-1) N^(2k-1))."""
    for i, V in enumerate(debye_log_polynomials(16), start=1):
        bernoulli = Fraction(*mpmath.bernfrac(i + 1)) if i % 2 else Fraction(0)
        assert sum(V) == -bernoulli / (i * (i + 1))


@pytest.mark.parametrize("t", [Fraction(0), Fraction(1, 3), Fraction(7, 8), Fraction(1), Fraction(-2)])
def test_exponential_gives_back_the_debye_polynomials(t):
    """exp(sum V_i x^i) = sum U_i x^i, multiplied out as power series in x with exact coefficients."""
    terms = 9
    v = [Fraction(0), *(at(V, t) for V in debye_log_polynomials(terms))]
    power, series = [Fraction(1)], [Fraction(0)] * (terms + 1)
    for n in range(terms + 1):
        for i, c in enumerate(power):
            series[i] += c
        power = [c / (n + 1) for c in multiply(power, v)[: terms + 1]]  # (sum V_i x^i)^n / n!
    assert series == [at(U, t) for U in debye(terms)]


@pytest.mark.parametrize("terms", [1, 4, 8])
@pytest.mark.parametrize("z", ["0.01", "0.7", "30"])
def test_uniform_expansion_of_the_bessel_function(terms, z):
    """DLMF 10.41.3 at order 60, to within twice the first term left out."""
    with mpmath.workdps(60):
        N, z = mpmath.mpf(60), mpmath.mpf(z)
        q = mpmath.sqrt(1 + z * z)
        exponent = N * (q + mpmath.log(z / (1 + q)))
        exact = mpmath.log(mpmath.besseli(N, N * z)) - exponent + mpmath.log(2 * mpmath.pi * N * q) / 2
        *kept, one_more, two_more = (
            mpmath.polyval([mpmath.mpf(c.numerator) / c.denominator for c in reversed(V)], 1 / q) / N**i
            for i, V in enumerate(debye_log_polynomials(terms + 2), start=1)
        )
        # Some V_i vanish near t = 1, hence the second.
        assert abs(sum(kept) - exact) < 2 * (abs(one_more) + abs(two_more))


def test_more_terms_begin_with_the_same_ones():
    assert debye_log_polynomials(5)[:3] == debye_log_polynomials(3)


def test_polynomial_arithmetic():
    one, two, three = Fraction(1), Fraction(2), Fraction(3)
    assert multiply([one, two], [three, one]) == [3, 7, 2]
    assert multiply([], [one]) == multiply([one], []) == []
    assert derivative([three, one, two]) == [1, 4]
    assert derivative([three]) == []
