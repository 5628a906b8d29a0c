"""Checks of numbers, shared by Python and the command line: invalid values are rejected before any work."""

from __future__ import annotations

import math
from numbers import Integral, Real

from ..errors import InvalidArgument

MAX_SEED = 2**32 - 1
"""The largest seed that every random number generator accepts."""

MAX_INT = 2**31 - 1
"""The largest count of items held in memory: samples of a batch, tokens of a window."""


def is_finite(value: object) -> bool:
    """Whether a value is a finite real number that fits a float."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def whole(name: str, value: object, low: int, high: int = MAX_INT) -> int:
    """`value` as an int; InvalidArgument unless it is an integer from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not low <= int(value) <= high:
        raise InvalidArgument(f"{name} must be an integer {ends(value, low, high)}, got {value!r}")
    return int(value)


def ends(value: object, low: float | None, high: float | None) -> str:
    """A range as text, for the error about a value outside it; if `MAX_INT` closes it, only the violated end."""
    if high is None or (high == MAX_INT and not (is_finite(value) and value > high)):  # type: ignore[operator]
        return f"of at least {low}"
    return f"of at most {high}" if high == MAX_INT else f"from {low} to {high}"


def number(name: str, value: object) -> float:
    """`value` as a float; InvalidArgument unless it is a finite number of at least 0."""
    if not is_finite(value) or float(value) < 0:  # type: ignore[arg-type]
        raise InvalidArgument(f"{name} must be a finite number of at least 0, got {value!r}")
    return float(value)  # type: ignore[arg-type]


def seconds(name: str, value: object) -> float:
    """A time limit as a float, infinity for None; InvalidArgument unless it is positive."""
    if value is None:
        return math.inf
    if not (is_finite(value) or value == math.inf) or not float(value) > 0:  # type: ignore[arg-type]
        raise InvalidArgument(f"{name} must be a positive number of seconds, got {value!r}")
    return float(value)  # type: ignore[arg-type]
