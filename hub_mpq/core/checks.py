"""Checks of options, which may come as words from the command line."""

from __future__ import annotations

import math
from numbers import Integral, Real

from ..errors import InvalidArgument


def whole(name: str, value: object, low: int, high: int | None = None) -> int:
    """`value` as an int; InvalidArgument unless it is a whole number within the ends."""
    if (
        isinstance(value, bool)
        or not isinstance(value, Integral)
        or int(value) < low
        or (high is not None and int(value) > high)
    ):
        ends = f"from {low} to {high}" if high is not None else f"of at least {low}"
        raise InvalidArgument(f"{name} is a whole number {ends}, not {value!r}")
    return int(value)


def number(name: str, value: object) -> float:
    """`value` as a float; InvalidArgument unless it is a finite number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value) or value < 0:
        raise InvalidArgument(f"{name} is a finite number of at least 0, not {value!r}")
    return float(value)


def seconds(name: str, value: object) -> float:
    """A time limit as a float, None as infinity; InvalidArgument unless it is a number of seconds above 0."""
    if value is None:
        return math.inf
    if isinstance(value, bool) or not isinstance(value, Real) or not value > 0:
        raise InvalidArgument(f"{name} is a number of seconds above 0, not {value!r}")
    return float(value)
