"""What every quantizer is."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from ..core import QuantSpec


class Quantizer(nn.Module, ABC):
    """Maps a float tensor to the nearest points of an integer grid: x ≈ scale · (q − zero_point)."""

    @property
    @abstractmethod
    def spec(self) -> QuantSpec | None:
        """The grid in force; None when the quantizer passes its input through."""

    @property
    @abstractmethod
    def scale(self) -> Tensor:
        """Step size(s) in force, float32, above zero."""

    @property
    @abstractmethod
    def zero_point(self) -> int:
        """The integer that stands for 0."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """`x` on the grid, same shape and dtype."""

    @abstractmethod
    def to_int(self, x: Tensor) -> Tensor:
        """Integers q − zero_point, of x's shape, as int8 or int16: exactly what forward multiplies by the scale."""
