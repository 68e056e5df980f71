"""Writes normalizer_truth.csv, what the normaliser is tested against: `python tests/data/make_normalizer_truth.py`.

Every value is the midpoint of an interval that provably holds the exact one (Arb, through python-flint), with a
relative radius below 1e-32; 25 digits of it are kept. The concentrations are float32 numbers, so that float32 and
float64 are scored at the same input. Columns, in nats:

    p, kappa          the dimension and the concentration
    log_c_relative    D = log C_p(kappa) - log C_p(0) = -log 0F1(; p/2; kappa^2/4)
    log_c             log C_p(kappa)
    mean_resultant    A = I_{p/2}(kappa) / I_{p/2-1}(kappa) = -dD/dkappa
    slope             dA/dkappa
    source            hypgeom_0f1@BITS, or power_series@BITS where hypgeom_0f1 gives no finite interval
"""

import csv
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
from flint import arb, ctx

# Small ones, odd ones, and both sides of every p at which the implementation changes its number of terms.
DIMENSIONS = [*range(2, 21), 24, 31, 32, 33, 34, 35, 40, 41, 42, 43, 48, 63, 64, 65, 95, 96, 97, 127, 128, 129]
DIMENSIONS += [192, 255, 256, 257, 384, 511, 512, 513, 768, 1024, 2048, 4096, 32768, 100_003, 1_000_000]
# For p <= 16 the slope changes to its large-kappa series at 14 (float32) or 28 (float64); both sides, and around them.
SWITCHES = [9.0, 10.0, 12.0, 14.0, 18.0, 21.0, 25.0, 28.0, 33.0]
DIGITS = 25
RELATIVE_BITS = 107  # 2^-107 = 6e-33


def concentrations(p: int) -> list[float]:
    """The kappa at which dimension p is tested, ascending, each exactly a float32."""
    points = [2e-38, 1e-30, 1e-22, 1e-19, 1e-18, 1e-17, 1e-16, 1e-15]  # D, then A, leave float32's normal numbers here
    points += list(10.0 ** np.arange(-8.0, 9.01, 1.0))
    points += list(p * np.array([0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0, 5.0, 10.0, 30.0, 100.0]))
    points += [
        2.0,
        3.0,
        5.0,
        7.0,
        14.2857,
        20.0,
        25.0,
        40.0,
        60.0,
        200.0,
        500.0,
    ]  # norms 0.2 to 5 at DINO's temperatures
    if p <= 18:
        points += chain.from_iterable((k, k * (1 - 2.0**-23), k * (1 + 2.0**-22)) for k in SWITCHES)
    return sorted({0.0} | {float(np.float32(k)) for k in points})


def power_series(b: arb, z: arb, z_float: float) -> tuple[arb, arb]:
    """0F1(; b; z) and 0F1(; b + 1; z) term by term: all are positive, and a geometric series bounds those left out."""
    term, zeroth, first, k = arb(1), arb(1), arb(1), 0
    b_float = float(b)
    while True:
        term *= z / ((k + 1) * (b + k))
        k += 1
        zeroth += term
        first += term * b / (b + k)
        if z_float < 0.5 * (k + 1) * (b_float + k) and term < zeroth * arb(2) ** (-ctx.prec):
            return zeroth + arb(0, term), first + arb(0, term)  # what follows is at most term * (1/2 + 1/4 + ...)


def accurate(*values: arb) -> bool:
    """Whether every interval is finite and narrow enough."""
    return all(value.is_finite() and value.rel_accuracy_bits() >= RELATIVE_BITS for value in values)


def log_c_at_zero(p: int) -> arb:
    """log C_p(0): minus the logarithm of the area of the sphere in p dimensions."""
    return (arb(p) / 2).lgamma() - arb(2).log() - arb(p) / 2 * arb.pi().log()


def derived(p: int, kappa: arb, zeroth: arb, first: arb) -> tuple[arb, arb, arb, arb]:
    """D, log C_p, A and A' from the two hypergeometric values."""
    log_c_relative = -zeroth.log()
    resultant = kappa / p * first / zeroth
    slope = 1 - resultant**2 - (p - 1) * resultant / kappa
    return log_c_relative, log_c_at_zero(p) + log_c_relative, resultant, slope


def truth(p: int, kappa: float) -> tuple[tuple[arb, ...], str]:
    """(D, log C_p, A, A') and where they come from; the precision doubles until the intervals are narrow."""
    ctx.prec = 512
    if kappa == 0.0:
        return (arb(0), log_c_at_zero(p), arb(0), arb(1) / p), "limit"
    for bits in (512, 1024, 2048, 4096, 8192, 16384, 32768):
        ctx.prec = bits
        k, b = arb(kappa), arb(p) / 2
        z = k * k / 4
        values = derived(p, k, z.hypgeom_0f1(b), z.hypgeom_0f1(b + 1))
        if accurate(*values):
            return values, f"hypgeom_0f1@{bits}"
    ctx.prec = 512
    values = derived(p, k, *power_series(arb(p) / 2, z, kappa * kappa / 4))
    if not accurate(*values):
        raise ArithmeticError(f"no interval of relative radius 2^-{RELATIVE_BITS} at p={p}, kappa={kappa!r}")
    return values, "power_series@512"


def rows() -> Iterator[list[str]]:
    """The table, one list of strings per line."""
    for p in DIMENSIONS:
        for kappa in concentrations(p):
            values, source = truth(p, kappa)
            yield [str(p), repr(kappa), *(value.str(DIGITS, radius=False) for value in values), source]
        print(f"p={p} done", flush=True)


def main() -> None:
    """Write the table beside this file."""
    path = Path(__file__).with_name("normalizer_truth.csv")
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["p", "kappa", "log_c_relative", "log_c", "mean_resultant", "slope", "source"])
        writer.writerows(rows())
    print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
