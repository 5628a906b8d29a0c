"""The quantization grid of a tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import InvalidArgument
from .bits import check_width

Granularity = Literal["tensor", "channel", "group"]


@dataclass(frozen=True)
class QuantSpec:
    """The integer grid of one tensor: x ≈ scale · (q − zero_point) with q in [qmin, qmax].

    A signed 1-bit tensor has the values {−scale, +scale}: qmin = −1 and qmax = 1, without zero.

    Args:
        num_bits: Bit-width, 1 to 8.
        signed: Whether q can be negative.
        symmetric: Whether the zero point is 0.
        granularity: What shares a scale: the whole "tensor", a "channel" or a "group".
        axis: Channel axis, if granularity is "channel".
        group_size: Consecutive values that share a scale, if granularity is "group".

    Raises:
        InvalidArgument: The bit-width or the granularity is not valid.

    Example:
        >>> from hub_mpq.core import QuantSpec
        >>> spec = QuantSpec(4)
        >>> spec.qmin, spec.qmax
        (-8, 7)
    """

    num_bits: int
    signed: bool = True
    symmetric: bool = True
    granularity: Granularity = "tensor"
    axis: int = 0
    group_size: int | None = None

    def __post_init__(self) -> None:
        check_width(self.num_bits)
        if self.granularity not in ("tensor", "channel", "group"):
            raise InvalidArgument(f"granularity must be 'tensor', 'channel' or 'group', got {self.granularity!r}")

    @property
    def binary(self) -> bool:
        """Whether the values are {−scale, +scale}."""
        return self.signed and self.num_bits == 1

    @property
    def qmin(self) -> int:
        """The smallest integer of the grid."""
        return -1 if self.binary else -(2 ** (self.num_bits - 1)) if self.signed else 0

    @property
    def qmax(self) -> int:
        """The largest integer of the grid."""
        return 1 if self.binary else 2 ** (self.num_bits - 1) - 1 if self.signed else 2**self.num_bits - 1
