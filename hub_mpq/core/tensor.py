"""How one tensor is quantized."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import InvalidArgument
from .bits import check_width

Granularity = Literal["tensor", "channel", "group"]


@dataclass(frozen=True)
class QuantSpec:
    """Integer grid of one tensor: x ≈ scale · (q − zero_point), q in [qmin, qmax].

    A signed 1-bit tensor is {−scale, +scale}, a code of its own (qmin = −1, qmax = 1, no zero).
    `axis` is the channel axis when granularity is "channel".
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
            raise InvalidArgument(f"granularity is tensor, channel or group, not {self.granularity!r}")

    @property
    def binary(self) -> bool:
        return self.signed and self.num_bits == 1

    @property
    def qmin(self) -> int:
        return -1 if self.binary else -(2 ** (self.num_bits - 1)) if self.signed else 0

    @property
    def qmax(self) -> int:
        return 1 if self.binary else 2 ** (self.num_bits - 1) - 1 if self.signed else 2**self.num_bits - 1
