"""How amounts are written by people, and shown to them."""

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
        raise InvalidArgument(f"{what}: {value!r} is no amount; write for example {example}")
    if isinstance(value, (int, float)):
        amount = float(value) if is_finite(value) else math.nan
    else:
        match = _NUMBER.fullmatch(str(value).strip())
        if not match:
            raise InvalidArgument(f"{what}: {value!r} is no amount; write for example {example}")
        if match.group(2).lower() not in units:
            found = f"unknown unit {match.group(2)!r}" if match.group(2) else "no unit"
            raise InvalidArgument(f"{what}: {value!r} has {found}; write for example {example}")
        amount = float(match.group(1)) * units[match.group(2).lower()]
    if not math.isfinite(amount) or amount <= 0:
        raise InvalidArgument(f"{what}: {value!r} must be finite and above zero")
    return amount


def parse_count(value: str | float, what: str = "bitops") -> float:
    """Parse "34.7G" to 34.7e9. A plain number counts single operations; a string needs its unit (K, M, G, T)."""
    return _parse(value, _COUNT, what, "34.7G")


def parse_bytes(value: str | float, what: str = "size") -> float:
    """Parse "5.7MB" to 5.7e6 (decimal), "4MiB" → binary. A plain number counts bytes; a string needs its unit."""
    return _parse(value, _BYTES, what, "5.7MB")


def parse_seconds(value: str | float, what: str = "latency") -> float:
    """Parse "5ms" to 0.005. A plain number counts seconds; a string needs its unit (ns, us, ms, s)."""
    return _parse(value, _SECONDS, what, "5ms")


def parse_ratio(value: str | float, what: str = "compression") -> float:
    """A plain number; "12.2x" is one too."""
    try:
        ratio = float(value.strip().lower().removesuffix("x") if isinstance(value, str) else value)
    except (TypeError, ValueError, OverflowError):
        ratio = math.nan
    if isinstance(value, bool) or not math.isfinite(ratio):
        raise InvalidArgument(f"{what}: {value!r} is no number; write for example 12.2")
    return ratio


def human(amount: float) -> str:
    """1234567 → "1.235 M"."""
    for factor, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " K")):
        if abs(amount) >= factor:
            return f"{amount / factor:.3f}{unit}"
    return f"{amount:.4g}"


def human_seconds(seconds: float) -> str:
    """0.00512 → "5.12 ms"."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if abs(seconds) >= factor:
            return f"{seconds / factor:.4g} {unit}"
    return f"{seconds / 1e-9:.4g} ns"
