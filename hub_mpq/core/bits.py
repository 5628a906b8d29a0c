"""Bit-widths: of one layer, and the candidates of a search."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import total_ordering

from ..errors import InvalidArgument

FLOAT_BITS = 32
"""The bit-width that stands for "not quantized"."""

_LEVEL = re.compile(r"(?:W(\d{1,3})(?:g(\d{1,6}))?(z)?)?(?:A(\d{1,3}))?", re.IGNORECASE)


def check_width(bits: object, *, allow_float: bool = False) -> int:
    """Return a bit-width if it is valid.

    Args:
        bits: The bit-width, an integer from 1 to 8.
        allow_float: Accept 32 (float) too.

    Returns:
        `bits`.

    Raises:
        InvalidArgument: `bits` is not a valid bit-width.

    Example:
        >>> from hub_mpq.core import check_width
        >>> check_width(4), check_width(32, allow_float=True)
        (4, 32)
    """
    if isinstance(bits, bool) or not isinstance(bits, int):
        raise InvalidArgument(f"a bit-width must be an integer from 1 to 8, got {bits!r}")
    if not (1 <= bits <= 8 or (allow_float and bits == FLOAT_BITS)):
        raise InvalidArgument(
            f"a bit-width must be an integer from 1 to 8{' (or 32 for float)' if allow_float else ''}, got {bits}"
        )
    return bits


def check_group_size(size: object) -> int | None:
    """Return a group size (an integer from 8 to 999999, or None), or raise InvalidArgument."""
    if size is None or (isinstance(size, int) and not isinstance(size, bool) and 8 <= size < 10**6):
        return size
    raise InvalidArgument(
        f"a group size must be None or an integer from 8 to 999999, such as 32, 64 or 128, got {size!r}"
    )


GroupSizes = int | None | Iterable["int | None"]
"""One group size, or several for the solver to choose from; None means one scale per output channel."""


def check_group_sizes(value: GroupSizes) -> tuple[int | None, ...]:
    """The group sizes in the given order, without duplicates; InvalidArgument if one is not valid."""
    several = isinstance(value, Iterable) and not isinstance(value, str)
    return tuple(dict.fromkeys(map(check_group_size, value if several else (value,)))) or (None,)  # type: ignore[arg-type]


@total_ordering
@dataclass(frozen=True)
class LayerBits:
    """The bit-widths of one layer's weight and input, and the granularity of the weight's scales.

    Written "W4A8"; "W4g128A8" with one scale per 128 weights, "W4g128zA32" with zero points as well.

    Args:
        weight: Bit-width of the weight, 1 to 8, or 32 for float.
        activation: Bit-width of the input activation, 1 to 8, or 32 for float.
        group_size: Number of consecutive weights along the input axis that share a scale; None for one scale per
            output channel (or per tensor). Only weights packed row by row can have groups: those of linear layers,
            embeddings and experts.
        symmetric: False adds a zero point of `weight` bits to each scale. A 1-bit weight {-s, +s} cannot have one.

    Raises:
        InvalidArgument: A bit-width, the group size or their combination is not valid.

    Example:
        >>> from hub_mpq import LayerBits
        >>> bits = LayerBits(4, 8, group_size=128)
        >>> print(bits, bits == LayerBits.parse("W4g128A8"))
        W4g128A8 True
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
            raise InvalidArgument("a float weight cannot have groups or zero points")
        if not self.symmetric and self.weight == 1:
            raise InvalidArgument("a 1-bit weight cannot have a zero point: its values are -s and +s")

    @property
    def grouped(self) -> bool:
        """Whether the weight has a group size or zero points."""
        return self.group_size is not None or not self.symmetric

    @property
    def of_weight(self) -> LayerBits:
        """The same weight with a float input: the part that layers with a shared weight have in common."""
        return replace(self, activation=FLOAT_BITS)

    def with_groups(self, group_size: int | None, symmetric: bool = True) -> LayerBits:
        """Return the same bit-widths with another group size and symmetry.

        Args:
            group_size: The group size, see `LayerBits`.
            symmetric: False for zero points.

        Returns:
            The new bits. A float weight is returned unchanged, and a 1-bit weight gets no zero points.
        """
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
        """Parse a level such as "W4A8" or "W4g128zA8".

        Args:
            text: The level. An omitted part ("W4", "A8") is float.

        Returns:
            The parsed bits.

        Raises:
            InvalidArgument: The text is not a valid level.
        """
        match = _LEVEL.fullmatch(text.strip()) if isinstance(text, str) else None
        if not match or not match.group(0):
            raise InvalidArgument(f"{text!r} is not a valid bit-width level; use for example W4A8")
        weight, group, zero, activation = match.groups()
        return cls(
            int(weight or FLOAT_BITS), int(activation or FLOAT_BITS), None if group is None else int(group), not zero
        )


def nearest(choices: Iterable[LayerBits], bits: LayerBits) -> LayerBits:
    """The choice closest to a level: the one that falls short of its bit-widths by the fewest bits.

    Ties go to the choice that exceeds the level by the fewest bits, then to the narrower weight (it has one scale per
    output channel, and the file becomes smaller), then to the level's group size and zero points. Our construction.

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
        raise InvalidArgument(f"candidates must be a list of bit-widths such as [2, 3, 4], got {values!r}")
    values = tuple(values)
    widths = values if allow_float and values == (FLOAT_BITS,) else tuple(sorted({check_width(v) for v in values}))
    if not widths:
        raise InvalidArgument("candidates are empty: give at least one bit-width from 1 to 8")
    return widths


@dataclass(frozen=True)
class Candidates:
    """The bit-widths and group sizes that a search may choose from for one layer.

    Args:
        weight: Bit-widths of the weight. The default, 2 to 6 bits, is that of the LIMPQ authors.
        activation: Bit-widths of the input; (32,) keeps the input float, so that only weights are searched.
        group_size: Group sizes of the weight, see `LayerBits`; the solver chooses if there are several.
        symmetric: False for zero points.
        menu: Everything that the layer may become, as a `Target` allows it. It replaces `weight`, `group_size` and
            `symmetric`, which then describe what it contains, and, if it names input bit-widths, `activation` too: only
            these pairs are then candidates. None for every bit-width with every group size.

    Raises:
        InvalidArgument: A bit-width or a group size is not valid, or there are none.

    Example:
        >>> from hub_mpq import Candidates
        >>> [str(bits) for bits in Candidates(weight=(4, 8), activation=(8,)).pairs]
        ['W4A8', 'W8A8']
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
        """Everything that the weight may become, ascending, with float inputs."""
        if self.menu is not None:
            return tuple(sorted({bits.of_weight for bits in self.menu}))
        return tuple(sorted({bits for width in self.weight for bits in self.grouped(LayerBits(width, FLOAT_BITS))}))

    @property
    def pairs(self) -> tuple[LayerBits, ...]:
        """Everything that the layer may become, ascending."""
        if self.menu is not None and any(bits.activation != FLOAT_BITS for bits in self.menu):
            return self.menu
        return tuple(sorted(replace(bits, activation=a) for bits in self.weights for a in self.activation))

    def grouped(self, bits: LayerBits) -> tuple[LayerBits, ...]:
        """Return the candidates with the bit-widths of `bits`.

        Args:
            bits: The bit-widths; its group size and symmetry are ignored.

        Returns:
            One entry per group size; with a `menu`, the entries that it holds, or ().
        """
        if self.menu is None:
            return tuple(bits.with_groups(size, self.symmetric) for size in self.group_size)
        found = self.weights if bits.activation == FLOAT_BITS else self.pairs
        return tuple(b for b in found if (b.weight, b.activation) == (bits.weight, bits.activation))

    @property
    def grids(self) -> tuple[tuple[int | None, bool], ...]:
        """The distinct (group size, symmetric) of all weights, ascending; one if only the bit-width is searched."""
        found = {(b.group_size, b.symmetric) for b in self.weights if b.weight > 1 or self.symmetric}
        return tuple(sorted(found or {(self.group_size[0], True)}, key=lambda grid: (grid[0] or 0, grid[1])))

    @property
    def float_inputs(self) -> bool:
        """Whether the inputs stay float."""
        return self.activation == (FLOAT_BITS,)

    @classmethod
    def of(cls, value: Candidates | Iterable[int] | None) -> Candidates:
        """Convert a value to candidates.

        Args:
            value: Candidates, which are returned unchanged; one list of bit-widths for both weights and inputs; or
                None for the default.

        Returns:
            The candidates.
        """
        if value is None:
            return cls()
        if isinstance(value, cls):
            return value
        widths = _widths(value)  # type: ignore[arg-type]
        return cls(widths, widths)
