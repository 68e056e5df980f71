"""Checks of arguments that more than one module makes."""

from __future__ import annotations

import math
import operator
from collections.abc import Collection

from torch import Tensor


def at_least(name: str, value: int, minimum: int) -> int:
    """`value` as an int, or an error that names the argument."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"`{name}` (={value!r}) must be an integer >= {minimum}") from None
    if number < minimum:
        raise ValueError(f"`{name}` (={value}) must be an integer >= {minimum}")
    return number


def positive(name: str, value: float) -> float:
    """`value`, or an error unless it is a finite number > 0."""
    try:
        valid = 0 < value < math.inf
    except (TypeError, ValueError, RuntimeError):  # the latter two: NumPy and torch have no truth of several numbers
        raise TypeError(f"`{name}` (={value!r}) must be a finite number > 0") from None
    if not valid:
        raise ValueError(f"`{name}` (={value}) must be a finite number > 0")
    return value


def constant(name: str, value: float) -> float:
    """`value`, or an error unless it is a finite number > 0 and no tensor that waits for a gradient."""
    positive(name, value)
    if isinstance(value, Tensor) and value.requires_grad:
        raise ValueError(
            f"`{name}` (={value.item():g}) must not require grad: no gradient flows to it here. Pass a number, or use "
            "`prototype_cross_entropy_reference`"
        )
    return value


def one_of(name: str, value: str, allowed: Collection[str]) -> str:
    """`value`, or an error that lists the choices."""
    if value not in allowed:
        raise ValueError(f"`{name}` (={value!r}) must be one of {', '.join(map(repr, allowed))}")
    return value
