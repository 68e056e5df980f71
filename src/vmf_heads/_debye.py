"""Debye polynomials of the uniform Bessel expansion, in exact rational arithmetic."""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from itertools import zip_longest

Polynomial = list[Fraction]  # index = power


@cache
def debye_log_polynomials(terms: int) -> tuple[Polynomial, ...]:
    """V_1(t), ..., V_terms(t) with sum_i V_i/N^i = log sum_i U_i/N^i, where U_i are those of DLMF 10.41.10.

    >>> [str(c) for c in debye_log_polynomials(1)[0]]  # V_1 = U_1 = (3t - 5t^3)/24
    ['0', '1/8', '0', '-5/24']
    """
    U: list[Polynomial] = [[Fraction(1)]]
    for _ in range(terms):
        U.append(_next_debye(U[-1]))
    V: list[Polynomial] = []
    for n in range(1, terms + 1):
        # n U_n = n V_n + sum_j j V_j U_{n-j}: the derivative of exp(sum V_i x^i) = sum U_i x^i, term by term.
        total = list(U[n])
        for j in range(1, n):
            for power, c in enumerate(multiply(V[j - 1], U[n - j])):
                total[power] -= Fraction(j, n) * c
        V.append(total)
    return tuple(V)


def _next_debye(U: Polynomial) -> Polynomial:
    """U_{k+1} = t^2 (1 - t^2) U_k' / 2 + (1/8) int_0^t (1 - 5 s^2) U_k(s) ds, DLMF 10.41.9."""
    half = Fraction(1, 2)
    moved = multiply([Fraction(0), Fraction(0), half, Fraction(0), -half], derivative(U))
    integrand = multiply([Fraction(1, 8), Fraction(0), Fraction(-5, 8)], U)
    result = [Fraction(0)] * (len(U) + 3)
    for power, c in enumerate(moved):
        result[power] += c
    for power, c in enumerate(integrand):
        result[power + 1] += c / (power + 1)
    return result


def add(a: Polynomial, b: Polynomial) -> Polynomial:
    """The sum of two polynomials."""
    return [x + y for x, y in zip_longest(a, b, fillvalue=Fraction(0))]


def multiply(a: Polynomial, b: Polynomial) -> Polynomial:
    """The product of two polynomials."""
    if not a or not b:
        return []
    product = [Fraction(0)] * (len(a) + len(b) - 1)
    for i, x in enumerate(a):
        if x:
            for j, y in enumerate(b):
                product[i + j] += x * y
    return product


def derivative(a: Polynomial) -> Polynomial:
    """The derivative of a polynomial; that of a constant is the empty list."""
    return [power * c for power, c in enumerate(a)][1:]
