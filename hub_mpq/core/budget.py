"""Budgets: absolute numbers with a unit, or a level such as "W4A4"."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from ..errors import InvalidArgument
from .bits import LayerBits

_NUMBER = re.compile(r"([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)")
_COUNT = {"k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15, "bitops": 1.0}
_COUNT |= {f"{prefix}bitops": factor for prefix, factor in _COUNT.items() if prefix != "bitops"}
_BYTES = {"b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def _parse(value: str | float, units: Mapping[str, float], what: str, example: str) -> float:
    if isinstance(value, bool):
        raise InvalidArgument(f"{what}: {value!r} is no amount; write for example {example}")
    if isinstance(value, (int, float)):
        amount = float(value)
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


def parse_ratio(value: str | float, what: str = "compression") -> float:
    """A plain number; "12.2x" is one too."""
    try:
        return float(value.strip().lower().removesuffix("x") if isinstance(value, str) else value)
    except (TypeError, ValueError):
        raise InvalidArgument(f"{what}: {value!r} is no number; write for example 12.2") from None


@dataclass(frozen=True)
class Budget:
    """Limits on a policy; any mix, all of them hold.

    bitops: a level ("W4A4": the searched layers at that level, fixed layers untouched) or an absolute count
        of the whole model, float work at 32×32 included ("34.7G", or a number of BitOps).
    size: bytes of the packed file, header included ("5.7MB", or a number of bytes), or a level ("W4").
    compression: float32 bytes of all quantized layers' weights over their packed bits (LIMPQ's ratio), e.g. 12.2.
    weight_bits: mean bits of the searched layers' weights, each weight counted once.
    activation_memory: bytes of all quantized inputs of one sample together ("200KB"), or a level ("A4").
    activation_peak: bytes of the largest quantized input of one sample, absolute or a level.
    costs: {name: (limit, {layer: {"W4A4": cost}})}, any cost the user brings (measured latency, energy).
    """

    bitops: str | float | None = None
    size: str | float | None = None
    compression: str | float | None = None
    weight_bits: float | None = None
    activation_memory: str | float | None = None
    activation_peak: str | float | None = None
    costs: Mapping[str, tuple[float, Mapping[str, Mapping[str, float]]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if all(getattr(self, f.name) in (None, {}) for f in fields(self)):
            raise InvalidArgument('no budget given: name at least one limit, for example bitops="W4A4"')
        for name, parse in (
            ("bitops", parse_count),
            ("size", parse_bytes),
            ("activation_memory", parse_bytes),
            ("activation_peak", parse_bytes),
        ):
            value = getattr(self, name)
            if value is not None and not self.level(value):
                parse(value, name)
        if self.compression is not None and not parse_ratio(self.compression) >= 1:
            raise InvalidArgument(f"compression: {self.compression!r} must be at least 1")
        if self.weight_bits is not None and not parse_ratio(self.weight_bits, "weight_bits") > 0:
            raise InvalidArgument(f"weight_bits: {self.weight_bits!r} must be above zero")

    @staticmethod
    def level(value: str | float | None) -> LayerBits | None:
        """The LayerBits of a level, None when the value is an absolute amount."""
        if isinstance(value, str) and value.strip()[:1].upper() in ("W", "A"):
            return LayerBits.parse(value)
        return None
