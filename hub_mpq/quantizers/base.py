"""The interface of a quantizer."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from ..core import QuantSpec

T = TypeVar("T")


class LastRead(Generic[T]):
    """The result of `read` for a tensor, cached off the CPU, where every read would wait for the device.

    It is read again if the tensor was replaced (`load_state_dict(assign=True)`, `functional_call`) or written to.
    Copies start with an empty cache.
    """

    def __init__(self, read: Callable[[Tensor], T]) -> None:
        self.read = read
        self.last: tuple[Tensor, int, T] | None = None

    def __call__(self, tensor: Tensor) -> T:
        if tensor.is_cpu or tensor.is_inference():  # inference tensors have no version
            return self.read(tensor)
        if self.last is None or self.last[0] is not tensor or self.last[1] != tensor._version:
            self.last = (tensor, tensor._version, self.read(tensor))
        return self.last[2]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.read,)


def keep_dtype(fn: Callable[[Tensor], Tensor], tensors: Iterable[Tensor | None]) -> Callable[[Tensor], Tensor]:
    """The argument `fn` of `Module._apply`, changed to move these tensors between devices without casting them."""
    kept = {id(tensor) for tensor in tensors}

    def apply(tensor: Tensor) -> Tensor:
        out = fn(tensor)
        return tensor.to(out.device) if id(tensor) in kept and out.dtype != tensor.dtype else out

    return apply


def channel_rows(weight: Tensor, axis: int) -> Tensor:
    """A weight as [channels, values of one channel].

    Args:
        weight: Any shape.
        axis: The channel axis. If it is negative, it counts from the end, and all axes before the last two count as
            channels too (for a stack of matrices).
    """
    front = max(weight.dim() - 2, 0) if axis < 0 else 0
    moved = weight.movedim(axis, front)
    count = math.prod(moved.shape[: front + 1])
    return moved.reshape(count, weight.numel() // max(count, 1))


class Quantizer(nn.Module, ABC):
    """Base class of quantizers, which round a tensor to an integer grid: x ≈ scale · (q − zero_point).

    Example:
        >>> import torch
        >>> from hub_mpq.quantizers import LSQ, Quantizer
        >>> quantizer = LSQ([4], signed=True)
        >>> isinstance(quantizer, Quantizer), quantizer(torch.tensor([0.4, 1.6, 99.0])).tolist()
        (True, [0.0, 2.0, 7.0])
    """

    @property
    @abstractmethod
    def spec(self) -> QuantSpec | None:
        """The current grid; None if the input passes through unchanged."""

    @property
    @abstractmethod
    def scale(self) -> Tensor:
        """The current step size(s), float32, positive."""

    @property
    @abstractmethod
    def zero_point(self) -> int:
        """The integer that represents 0."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Round a tensor to the grid.

        Args:
            x: The tensor, of any shape.

        Returns:
            The rounded tensor, with the shape and dtype of `x`.
        """

    def of_matrix(self, stack: Tensor, index: int) -> Tensor:
        """Round one matrix of a stack to the grid that `forward` uses for the whole stack.

        Args:
            stack: The matrices, `[N, rows, columns]`.
            index: Index of the matrix.

        Returns:
            The rounded `stack[index]`, `[rows, columns]`.
        """
        out: Tensor = self(stack)[index]
        return out

    @abstractmethod
    def to_int(self, x: Tensor) -> Tensor:
        """Compute the integers that `forward` multiplies by the scale.

        Args:
            x: The tensor.

        Returns:
            q − zero_point with the shape of `x`, int8 or int16.
        """
