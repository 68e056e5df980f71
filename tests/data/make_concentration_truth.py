"""Writes concentration_truth.csv, for tests of vmf_concentration: `python tests/data/make_concentration_truth.py`.

Every kappa is proven to 30 digits by interval arithmetic (Arb, through python-flint): A_p is increasing, and the exact
R lies between its values at kappa (1 - 1e-30) and kappa (1 + 1e-30). The arguments are float32 numbers, so that float32
and float64 are scored at the same input. Columns:

    p         the dimension
    given     what the argument is: "resultant" R, or "complement" 1 - R
    argument  its value
    kappa     the concentration, 25 digits
    slope     dkappa/dR = 1 / A_p'(kappa), 25 digits
"""

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from flint import arb, ctx
from make_normalizer_truth import DIGITS, DIMENSIONS, power_series

RESULTANTS = [2e-38, 1e-30, 1e-20, 1e-10, 1e-6, 1e-4, 1e-3, 0.01, 0.03, 0.1, 0.2, 0.3, 0.4, 0.45, 0.5 - 2.0**-25, 0.5]
RESULTANTS += [0.5 + 2.0**-24, 0.55, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999, 0.9999, 1 - 2.0**-20, 1 - 2.0**-24]
COMPLEMENTS = [1 - 2.0**-24, 0.9, 0.75, 0.5, 0.45, 0.3, 0.2, 0.1, 0.05, 0.03, 0.01, 1e-3, 1e-4, 1e-6, 1e-9, 1e-12]
COMPLEMENTS += [1e-15, 1e-16, 3e-17, 2e-17, 1e-17, 1e-20, 1e-30, 1e-38]
# Where the implementation changes to its large-kappa series: at 40 for p < 34, and for the slope at 28 for p <= 16.
SWITCHES = [20.0, 27.0, 28.0, 29.0, 35.0, 39.9, 40.1, 45.0]
MARGIN = "1e-30"


def resultant(p: int, kappa: arb, bits: int) -> tuple[arb, arb]:
    """A and A' at an exact kappa, in intervals of relative radius below 2^-bits."""
    for precision in (256, 512, 1024, 2048, 4096, 8192, 16384, 32768):
        ctx.prec = precision
        order = arb(p) / 2
        z = kappa * kappa / 4
        candidates = [(order, z.hypgeom_0f1(order), z.hypgeom_0f1(order + 1))]
        candidates += [(None, kappa.bessel_i(order - 1, True), kappa.bessel_i(order, True))]
        for is_series, lower, upper in candidates:
            A = upper / lower if is_series is None else kappa / p * upper / lower
            slope = 1 - A * A - (p - 1) * A / kappa
            if all(v.is_finite() and v.rel_accuracy_bits() >= bits for v in (A, 1 - A, slope)):
                return A, slope
    ctx.prec = 512
    lower, upper = power_series(order, z, float(z))
    A = kappa / p * upper / lower
    slope = 1 - A * A - (p - 1) * A / kappa
    if not all(v.is_finite() and v.rel_accuracy_bits() >= bits for v in (A, 1 - A, slope)):
        raise ArithmeticError(f"no narrow interval at p={p}, kappa={kappa.str(20)}")
    return A, slope


def concentration(p: int, R: arb) -> tuple[arb, arb]:
    """kappa with A_p(kappa) = R, which is exact, and 1 / A_p'(kappa)."""
    ctx.prec = 512
    kappa = (R * (p - R * R) / (1 - R * R)).mid()
    for _ in range(12):
        A, slope = resultant(p, kappa, 130)
        ctx.prec = 512
        step = (R - A) / slope
        kappa = (kappa + step).mid()
        if abs(step) < kappa * arb("1e-40"):
            break
    margin = kappa * arb(MARGIN)
    below, above = resultant(p, (kappa - margin).mid(), 130)[0], resultant(p, (kappa + margin).mid(), 130)[0]
    if not below < R < above:
        raise ArithmeticError(f"not proven at p={p}, R={R.str(20)}")
    return kappa, 1 / resultant(p, kappa, 107)[1]


def arguments(p: int) -> Iterator[tuple[str, float]]:
    """(given, argument) pairs at which dimension p is tested, each argument exactly a float32."""
    resultants, complements = list(RESULTANTS), list(COMPLEMENTS)
    if p < 36:
        for kappa in SWITCHES:
            R = float(resultant(p, arb(kappa), 60)[0])
            resultants.append(R)
            complements.append(1 - R)
    yield from (("resultant", float(np.float32(x))) for x in sorted(resultants))
    yield from (("complement", float(np.float32(x))) for x in sorted(complements))


def rows() -> Iterator[list[str]]:
    """The table, one list of strings per line."""
    for p in DIMENSIONS:
        for given, argument in arguments(p):
            ctx.prec = 512
            exact = arb(argument) if given == "resultant" else 1 - arb(argument)
            kappa, slope = concentration(p, exact)
            yield [str(p), given, repr(argument), kappa.str(DIGITS, radius=False), slope.str(DIGITS, radius=False)]
        print(f"p={p} done", flush=True)


def main() -> None:
    """Write the table beside this file."""
    path = Path(__file__).with_name("concentration_truth.csv")
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["p", "given", "argument", "kappa", "slope"])
        writer.writerows(rows())
    print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
