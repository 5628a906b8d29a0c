"""What every quantizer is."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from ..core import QuantSpec

T = TypeVar("T")


class LastRead(Generic[T]):
    """What `read` says of a tensor, remembered off the CPU: reading waits for a GPU, and would at every step.

    It is read again once the tensor is another one (`load_state_dict(assign=True)`, `functional_call`) or was written
    to. Copies remember nothing.
    """

    def __init__(self, read: Callable[[Tensor], T]) -> None:
        self.read = read
        self.last: tuple[Tensor, int, T] | None = None

    def __call__(self, tensor: Tensor) -> T:
        if tensor.is_cpu or tensor.is_inference():  # made in inference_mode it has no version
            return self.read(tensor)
        if self.last is None or self.last[0] is not tensor or self.last[1] != tensor._version:
            self.last = (tensor, tensor._version, self.read(tensor))
        return self.last[2]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.read,)


def keep_dtype(fn: Callable[[Tensor], Tensor], tensors: Iterable[Tensor | None]) -> Callable[[Tensor], Tensor]:
    """`fn`, as `Module._apply` gets it, that moves these tensors to another device but casts none of them."""
    kept = {id(tensor) for tensor in tensors}

    def apply(tensor: Tensor) -> Tensor:
        out = fn(tensor)
        return tensor.to(out.device) if id(tensor) in kept and out.dtype != tensor.dtype else out

    return apply


def channel_rows(weight: Tensor, axis: int) -> Tensor:
    """A weight as [channels, values of one channel].

    Args:
        weight: Any shape.
        axis: What a channel is an index of. A negative one counts from the end, and all axes before the last two count
            channels too: of a stack of matrices.
    """
    front = max(weight.dim() - 2, 0) if axis < 0 else 0
    moved = weight.movedim(axis, front)
    count = math.prod(moved.shape[: front + 1])
    return moved.reshape(count, weight.numel() // max(count, 1))


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

    def of_matrix(self, stack: Tensor, index: int) -> Tensor:
        """`stack[index]` on the grid that `forward` puts all of a stack of matrices on."""
        out: Tensor = self(stack)[index]
        return out

    @abstractmethod
    def to_int(self, x: Tensor) -> Tensor:
        """Integers q − zero_point, of x's shape, as int8 or int16: exactly what forward multiplies by the scale."""
