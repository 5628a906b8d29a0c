"""Parsing and formatting of amounts with units."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from ..errors import InvalidArgument
from .checks import is_finite

_NUMBER = re.compile(r"([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-zµ]*)")
_COUNT = {"k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15, "bitops": 1.0}
_COUNT |= {f"{prefix}bitops": factor for prefix, factor in _COUNT.items() if prefix != "bitops"}
_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0}
_BYTES = {"b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def _parse(value: str | float, units: Mapping[str, float], what: str, example: str) -> float:
    if isinstance(value, bool):
        raise InvalidArgument(f"{what}: {value!r} is not a valid amount; use for example {example}")
    if isinstance(value, (int, float)):
        amount = float(value) if is_finite(value) else math.nan
    else:
        match = _NUMBER.fullmatch(str(value).strip())
        if not match:
            raise InvalidArgument(f"{what}: {value!r} is not a valid amount; use for example {example}")
        if match.group(2).lower() not in units:
            found = f"an unknown unit {match.group(2)!r}" if match.group(2) else "no unit"
            raise InvalidArgument(f"{what}: {value!r} has {found}; use for example {example}")
        amount = float(match.group(1)) * units[match.group(2).lower()]
    if not math.isfinite(amount) or amount <= 0:
        raise InvalidArgument(f"{what} must be positive and finite, got {value!r}")
    return amount


def parse_count(value: str | float, what: str = "bitops") -> float:
    """Parse a number of operations.

    Args:
        value: A number, or a string with a unit (K, M, G, T or P).
        what: Name of the quantity, for errors.

    Returns:
        The number of operations.

    Raises:
        InvalidArgument: The value is not a valid amount, or its unit is missing or unknown.

    Example:
        >>> from hub_mpq.core import parse_count
        >>> parse_count("34.7G")
        34700000000.0
    """
    return _parse(value, _COUNT, what, "34.7G")


def parse_bytes(value: str | float, what: str = "size") -> float:
    """Parse a number of bytes.

    Args:
        value: A number, or a string with a decimal (KB, MB, GB) or binary (KiB, MiB, GiB) unit.
        what: Name of the quantity, for errors.

    Returns:
        The number of bytes.

    Raises:
        InvalidArgument: The value is not a valid amount, or its unit is missing or unknown.

    Example:
        >>> from hub_mpq.core import parse_bytes
        >>> parse_bytes("5.7MB"), parse_bytes("4MiB")
        (5700000.0, 4194304.0)
    """
    return _parse(value, _BYTES, what, "5.7MB")


def parse_seconds(value: str | float, what: str = "latency") -> float:
    """Parse a time.

    Args:
        value: A number of seconds, or a string with a unit (ns, us, ms or s).
        what: Name of the quantity, for errors.

    Returns:
        The time in seconds.

    Raises:
        InvalidArgument: The value is not a valid amount, or its unit is missing or unknown.

    Example:
        >>> from hub_mpq.core import parse_seconds
        >>> parse_seconds("5ms")
        0.005
    """
    return _parse(value, _SECONDS, what, "5ms")


def parse_ratio(value: str | float, what: str = "compression") -> float:
    """Parse a ratio.

    Args:
        value: A number, or a string such as "12.2" or "12.2x".
        what: Name of the quantity, for errors.

    Returns:
        The ratio.

    Raises:
        InvalidArgument: The value is not a finite number.

    Example:
        >>> from hub_mpq.core import parse_ratio
        >>> parse_ratio("12.2x")
        12.2
    """
    try:
        ratio = float(value.strip().lower().removesuffix("x") if isinstance(value, str) else value)
    except (TypeError, ValueError, OverflowError):
        ratio = math.nan
    if isinstance(value, bool) or not math.isfinite(ratio):
        raise InvalidArgument(f"{what}: {value!r} is not a valid number; use for example 12.2")
    return ratio


def human(amount: float) -> str:
    """Format an amount with a decimal prefix.

    Args:
        amount: The amount.

    Returns:
        The number, with K, M, G or T if it is large.

    Example:
        >>> from hub_mpq.core import human
        >>> human(1234567)
        '1.235 M'
    """
    for factor, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " K")):
        if abs(amount) >= factor:
            return f"{amount / factor:.3f}{unit}"
    return f"{amount:.4g}"


def human_seconds(seconds: float) -> str:
    """Format a time with a suitable unit.

    Args:
        seconds: The time in seconds.

    Returns:
        The number and s, ms, us or ns.

    Example:
        >>> from hub_mpq.core import human_seconds
        >>> human_seconds(0.00512)
        '5.12 ms'
    """
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if abs(seconds) >= factor:
            return f"{seconds / factor:.4g} {unit}"
    return f"{seconds / 1e-9:.4g} ns"
