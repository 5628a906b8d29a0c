"""Widths: of one layer, and those a search may choose from."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import InvalidArgument

FLOAT_BITS = 32
"""The width that stands for "not quantized"."""

_LEVEL = re.compile(r"(?:W(\d+))?(?:A(\d+))?", re.IGNORECASE)


def check_width(bits: object, *, allow_float: bool = False) -> int:
    """Return `bits` as an int in 1..8 (or 32 with `allow_float`), or raise InvalidArgument."""
    if isinstance(bits, bool) or not isinstance(bits, int):
        raise InvalidArgument(f"a width is a whole number of bits from 1 to 8, not {bits!r}")
    if not (1 <= bits <= 8 or (allow_float and bits == FLOAT_BITS)):
        raise InvalidArgument(f"a width is from 1 to 8 bits{' (or 32: float)' if allow_float else ''}, not {bits}")
    return bits


@dataclass(frozen=True, order=True)
class LayerBits:
    """Widths of one layer's weight and of its input activation, in bits; 32 = float. Written "W4A8"."""

    weight: int
    activation: int

    def __post_init__(self) -> None:
        check_width(self.weight, allow_float=True)
        check_width(self.activation, allow_float=True)

    def __str__(self) -> str:
        return f"W{self.weight}A{self.activation}"

    @classmethod
    def parse(cls, text: str) -> LayerBits:
        """Parse "W4A8"; a part left out ("W4", "A8") is float."""
        match = _LEVEL.fullmatch(text.strip()) if isinstance(text, str) else None
        if not match or not match.group(0):
            raise InvalidArgument(f"{text!r} is no level of bits; write for example W4A8")
        return cls(*(int(part) if part else FLOAT_BITS for part in match.groups()))


def _widths(values: Iterable[int]) -> tuple[int, ...]:
    widths = tuple(sorted({check_width(v) for v in values}))
    if not widths:
        raise InvalidArgument("candidates are empty: name at least one width from 1 to 8")
    return widths


@dataclass(frozen=True)
class Candidates:
    """Widths a search may choose from, ascending. Default of the LIMPQ authors: 2 to 6 bits.

    activation (32,): inputs stay float, only weights are searched.
    """

    weight: tuple[int, ...] = (2, 3, 4, 5, 6)
    activation: tuple[int, ...] = (2, 3, 4, 5, 6)

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight", _widths(self.weight))
        inputs = tuple(self.activation)
        object.__setattr__(self, "activation", (FLOAT_BITS,) if inputs == (FLOAT_BITS,) else _widths(inputs))

    @property
    def float_inputs(self) -> bool:
        """Whether inputs stay float."""
        return self.activation == (FLOAT_BITS,)

    @classmethod
    def of(cls, value: Candidates | Iterable[int] | None) -> Candidates:
        """Candidates as they are, one list of widths for both, or None for the default."""
        if value is None:
            return cls()
        if isinstance(value, cls):
            return value
        if isinstance(value, (int, str)):
            raise InvalidArgument(f"candidates are a list of widths such as [2, 3, 4], not {value!r}")
        widths = tuple(value)  # type: ignore[arg-type]
        return cls(widths, widths)
