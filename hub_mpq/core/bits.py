"""Widths: of one layer, and those a search may choose from."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import total_ordering

from ..errors import InvalidArgument

FLOAT_BITS = 32
"""The width that stands for "not quantized"."""

_LEVEL = re.compile(r"(?:W(\d{1,3})(?:g(\d{1,6}))?(z)?)?(?:A(\d{1,3}))?", re.IGNORECASE)


def check_width(bits: object, *, allow_float: bool = False) -> int:
    """Return `bits` as an int in 1..8 (or 32 with `allow_float`), or raise InvalidArgument."""
    if isinstance(bits, bool) or not isinstance(bits, int):
        raise InvalidArgument(f"a width is a whole number of bits from 1 to 8, not {bits!r}")
    if not (1 <= bits <= 8 or (allow_float and bits == FLOAT_BITS)):
        raise InvalidArgument(f"a width is from 1 to 8 bits{' (or 32: float)' if allow_float else ''}, not {bits}")
    return bits


def check_group_size(size: object) -> int | None:
    """Return a group size, a whole number of at least 8 or None, or raise InvalidArgument."""
    if size is None or (isinstance(size, int) and not isinstance(size, bool) and 8 <= size < 10**6):
        return size
    raise InvalidArgument(f"a group size is a whole number from 8 to 999999 (32, 64, 128), or None, not {size!r}")


GroupSizes = int | None | Iterable["int | None"]
"""One group size, or several for the solver to choose from; None: one scale per output channel."""


def check_group_sizes(value: GroupSizes) -> tuple[int | None, ...]:
    """The group sizes that a user names, in this order; InvalidArgument for what is none."""
    several = isinstance(value, Iterable) and not isinstance(value, str)
    return tuple(dict.fromkeys(map(check_group_size, value if several else (value,)))) or (None,)  # type: ignore[arg-type]


@total_ordering
@dataclass(frozen=True)
class LayerBits:
    """Widths of one layer's weight and of its input activation, and how the weight is scaled.

    Written "W4A8"; "W4g128A8" with a scale for every 128 weights, "W4g128zA32" with zero points too.

    Args:
        weight: Bits of a weight, 1 to 8; 32 is float.
        activation: Bits of an input, 1 to 8; 32 is float.
        group_size: Consecutive weights along the input axis that share a scale; None: one scale per output channel (or
            per tensor). Only weights that are packed row by row have groups: of linear layers, embeddings, experts.
        symmetric: False adds a zero point of `weight` bits to each scale. A 1-bit weight has none: it is {-s, +s}.

    Raises:
        InvalidArgument: A width, the group size or their combination does not exist.
    """

    weight: int
    activation: int
    group_size: int | None = None
    symmetric: bool = True

    def __post_init__(self) -> None:
        check_width(self.weight, allow_float=True)
        check_width(self.activation, allow_float=True)
        check_group_size(self.group_size)
        if self.grouped and self.weight == FLOAT_BITS:
            raise InvalidArgument("a float weight has no groups and no zero points")
        if not self.symmetric and self.weight == 1:
            raise InvalidArgument("a 1-bit weight has no zero point: it is -s or +s")

    @property
    def grouped(self) -> bool:
        """Whether the weight has more than one scale per output channel, or zero points."""
        return self.group_size is not None or not self.symmetric

    @property
    def of_weight(self) -> LayerBits:
        """The weight's part alone: what layers that share a weight have in common."""
        return replace(self, activation=FLOAT_BITS)

    def with_groups(self, group_size: int | None, symmetric: bool = True) -> LayerBits:
        """The same widths with other groups and zero points; a float weight has neither, a 1-bit one no zero point."""
        if self.weight == FLOAT_BITS:
            return self
        return replace(self, group_size=group_size, symmetric=symmetric or self.weight == 1)

    def __str__(self) -> str:
        group = "" if self.group_size is None else f"g{self.group_size}"
        return f"W{self.weight}{group}{'' if self.symmetric else 'z'}A{self.activation}"

    def _key(self) -> tuple[int, int, int, bool]:
        return self.weight, self.activation, self.group_size or 0, self.symmetric

    def __lt__(self, other: object) -> bool:
        return self._key() < other._key() if isinstance(other, LayerBits) else NotImplemented

    @classmethod
    def parse(cls, text: str) -> LayerBits:
        """Parse "W4A8" or "W4g128zA8"; a part left out ("W4", "A8") is float."""
        match = _LEVEL.fullmatch(text.strip()) if isinstance(text, str) else None
        if not match or not match.group(0):
            raise InvalidArgument(f"{text!r} is no level of bits; write for example W4A8")
        weight, group, zero, activation = match.groups()
        return cls(
            int(weight or FLOAT_BITS), int(activation or FLOAT_BITS), None if group is None else int(group), not zero
        )


def nearest(choices: Iterable[LayerBits], bits: LayerBits) -> LayerBits:
    """The choice that a level stands for [our construction]: the one that lacks the fewest bits of its widths.

    Of several the one with the fewest bits to spare, then with the narrower weight (it has a scale for each output
    channel, and the file becomes smaller), then with the level's groups and zero points.

    Args:
        choices: At least one.
        bits: The level, such as W8A8.
    """

    def distance(b: LayerBits) -> tuple[int, int, int, bool, bool]:
        steps = (bits.weight - b.weight, bits.activation - b.activation)
        lacks, spare = sum(max(n, 0) for n in steps), sum(max(-n, 0) for n in steps)
        return lacks, spare, b.weight, b.group_size != bits.group_size, b.symmetric != bits.symmetric

    return min(sorted(choices), key=distance)


def _widths(values: Iterable[int], *, allow_float: bool = False) -> tuple[int, ...]:
    if not isinstance(values, Iterable) or isinstance(values, str):
        raise InvalidArgument(f"candidates are a list of widths such as [2, 3, 4], not {values!r}")
    values = tuple(values)
    widths = values if allow_float and values == (FLOAT_BITS,) else tuple(sorted({check_width(v) for v in values}))
    if not widths:
        raise InvalidArgument("candidates are empty: name at least one width from 1 to 8")
    return widths


@dataclass(frozen=True)
class Candidates:
    """What a search may choose from for one layer.

    Args:
        weight: Widths of the weight, ascending. Default of the LIMPQ authors: 2 to 6 bits.
        activation: Widths of the input; (32,): it stays float, only weights are searched.
        group_size: Group sizes of the weight, see `LayerBits`; the solver chooses where there are several.
        symmetric: False: with zero points.
        menu: Of a `Target`: all that the layer may become, in place of `weight`, `group_size` and `symmetric`, which
            then say what it holds. Where it names widths of the input, these pairs and no others, in place of
            `activation` too. None: every width with every group size.
    """

    weight: tuple[int, ...] = (2, 3, 4, 5, 6)
    activation: tuple[int, ...] = (2, 3, 4, 5, 6)
    group_size: tuple[int | None, ...] = (None,)
    symmetric: bool = True
    menu: tuple[LayerBits, ...] | None = None

    def __post_init__(self) -> None:
        if self.menu is not None:
            menu = tuple(sorted(set(self.menu)))
            object.__setattr__(self, "menu", menu)
            object.__setattr__(self, "weight", tuple(bits.weight for bits in menu))
            object.__setattr__(self, "group_size", tuple(bits.group_size for bits in menu))
            object.__setattr__(self, "symmetric", all(bits.symmetric for bits in menu))
            if inputs := {bits.activation for bits in menu} - {FLOAT_BITS}:
                object.__setattr__(self, "activation", tuple(inputs))
        object.__setattr__(self, "weight", _widths(self.weight))
        object.__setattr__(self, "group_size", check_group_sizes(self.group_size))
        object.__setattr__(self, "activation", _widths(self.activation, allow_float=True))

    @property
    def weights(self) -> tuple[LayerBits, ...]:
        """All that the weight may become, ascending; inputs do not count."""
        if self.menu is not None:
            return tuple(sorted({bits.of_weight for bits in self.menu}))
        return tuple(sorted({bits for width in self.weight for bits in self.grouped(LayerBits(width, FLOAT_BITS))}))

    @property
    def pairs(self) -> tuple[LayerBits, ...]:
        """All that the layer may become, ascending."""
        if self.menu is not None and any(bits.activation != FLOAT_BITS for bits in self.menu):
            return self.menu
        return tuple(sorted(replace(bits, activation=a) for bits in self.weights for a in self.activation))

    def grouped(self, bits: LayerBits) -> tuple[LayerBits, ...]:
        """The same widths with each of the group sizes, and of a menu with its zero points; () where it lacks them."""
        if self.menu is None:
            return tuple(bits.with_groups(size, self.symmetric) for size in self.group_size)
        found = self.weights if bits.activation == FLOAT_BITS else self.pairs
        return tuple(b for b in found if (b.weight, b.activation) == (bits.weight, bits.activation))

    @property
    def grids(self) -> tuple[tuple[int | None, bool], ...]:
        """(group size, symmetric) of all weights, ascending; one where nothing but the width is to be chosen."""
        found = {(b.group_size, b.symmetric) for b in self.weights if b.weight > 1 or self.symmetric}
        return tuple(sorted(found or {(self.group_size[0], True)}, key=lambda grid: (grid[0] or 0, grid[1])))

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
        widths = _widths(value)  # type: ignore[arg-type]
        return cls(widths, widths)
