"""Frozen dataclasses of settings: read from plain dicts with their types checked, written back, compared."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeVar

S = TypeVar("S")
Ranges = tuple[tuple[tuple[str, ...], str, Callable[[Any], bool]], ...]
"""Each range is (names of fields, what is allowed in words, the test of a value)."""


def read_settings(cls: type[S], values: Mapping[Any, Any], section: str = "") -> S:
    """Return the dataclass `cls` with these values; every field must be there, with a value of the field's type.

    Errors name fields by their place: `section` is "" or ends in a dot.
    """
    kinds = typing.get_type_hints(cls)
    if unknown := sorted(str(name) for name in values.keys() - kinds.keys()):
        named = ", ".join(section + name for name in unknown)
        raise ValueError(f"unknown fields {named}; the fields are {', '.join(kinds)}")
    if missing := [section + name for name in kinds if name not in values]:
        raise ValueError(f"missing fields {', '.join(missing)}")
    return cls(**{name: _typed(section + name, values[name], kind) for name, kind in kinds.items()})


def check_finite(settings: Any, section: str = "") -> None:
    """Raise ValueError naming the first number of a dataclass, in tuples and nested dataclasses too, that is none."""
    for name, value in vars(settings).items():
        if dataclasses.is_dataclass(value):
            check_finite(value, f"{section}{name}.")
        numbers = value if isinstance(value, tuple) else (value,)
        if not all(math.isfinite(number) for number in numbers if isinstance(number, float)):
            raise ValueError(f"`{section}{name}` (={value}) must be finite")


def check_ranges(settings: Any, ranges: Ranges, section: str = "") -> None:
    """Raise ValueError naming the first field whose value is not allowed."""
    for names, allowed, is_allowed in ranges:
        check_fields(settings, names, allowed, is_allowed, section)


def check_fields(
    settings: Any, names: Iterable[str], allowed: str, is_allowed: Callable[[Any], bool], section: str = ""
) -> None:
    """Raise ValueError unless the value of each of these fields is allowed."""
    for name in names:
        if not is_allowed(getattr(settings, name)):
            raise ValueError(f"`{section}{name}` (={getattr(settings, name)}) must be {allowed}")


LOWEST_TEMPERATURE = 1e-5
"""Below it the rounding of float32, 6e-8 for cosines, changes probabilities by more than half a per cent."""


def is_temperature(value: float) -> bool:
    """Return whether a number is a temperature that float32 can compute with."""
    return value >= LOWEST_TEMPERATURE


def is_share(value: float) -> bool:
    """Return whether a number is in [0, 1]."""
    return 0 <= value <= 1


def plain(settings: Any) -> dict[str, Any]:
    """Return the settings as dicts, lists and numbers, which YAML and JSON know."""

    def listed(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: listed(item) for key, item in value.items()}
        return [listed(item) for item in value] if isinstance(value, list | tuple) else value

    return listed(dataclasses.asdict(settings))


def flat(settings: Any, section: str = "") -> dict[str, Any]:
    """Return the values by field name, those of a nested dataclass by "section.field"."""
    values: dict[str, Any] = {}
    for name, value in vars(settings).items():
        nested = dataclasses.is_dataclass(value)
        values |= flat(value, f"{section}{name}.") if nested else {section + name: value}
    return values


def _typed(name: str, value: Any, kind: Any) -> Any:
    if typing.get_origin(kind) is types.UnionType:  # the annotation of a section is `Section | None`
        (section,) = [option for option in typing.get_args(kind) if option is not type(None)]
        if value is None or isinstance(value, section):
            return value
        if not isinstance(value, Mapping):
            raise ValueError(f"`{name}` (={value!r}) must be null or hold `field: value` lines")
        return read_settings(section, value, f"{name}.")
    if typing.get_origin(kind) is Literal:
        if value not in typing.get_args(kind):
            raise ValueError(f"`{name}` (={value!r}) must be one of {', '.join(map(repr, typing.get_args(kind)))}")
        return value
    if typing.get_origin(kind) is tuple:
        kinds = typing.get_args(kind)
        if not isinstance(value, list | tuple) or len(value) != len(kinds):
            raise ValueError(f"`{name}` (={value!r}) must be {len(kinds)} numbers")
        return tuple(_typed(name, item, inner) for item, inner in zip(value, kinds, strict=True))
    if kind is float and not isinstance(value, bool):
        try:
            number = float(value)  # YAML reads 1e-3, without a dot, as text
        except (TypeError, ValueError, OverflowError):
            pass
        else:
            if not math.isfinite(number):
                raise ValueError(f"`{name}` (={value!r}) must be a finite number")
            return number
    elif type(value) is kind:
        return value
    raise ValueError(f"`{name}` (={value!r}) must be of type {kind.__name__}")
