"""Convolutions in their packed form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .convolutions import SpatialLayer, convolution_of, transposed_convolution_of
from .layers import first_operand, operands
from .packed import PackedLayer, packed_product


class PackedConvolution(PackedLayer, SpatialLayer):
    """An ordinary convolution."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        x = first_operand(args, kwargs)
        operation = convolution_of(self) if x.dim() == self.batched_axes else None
        return self.convolve(x) if operation is None else packed_product(self, operation, x)


class PackedTransposedConvolution(PackedLayer, SpatialLayer):
    """A transposed convolution."""

    def forward(self, *args: Any, output_size: Sequence[int] | None = None, **kwargs: Any) -> Tensor:
        x = first_operand(args, kwargs)
        operation = transposed_convolution_of(self, x, args[1] if len(args) > 1 else output_size)
        if x.dim() == self.batched_axes:
            return packed_product(self, operation, x)
        x, weight = operands(self, x)
        return operation.run(x, weight, self.bias)


class PackedConv1d(PackedConvolution, nn.Conv1d):  # type: ignore[misc]
    """x [N, C, L]."""


class PackedConv2d(PackedConvolution, nn.Conv2d):  # type: ignore[misc]
    """x [N, C, H, W]."""


class PackedConv3d(PackedConvolution, nn.Conv3d):  # type: ignore[misc]
    """x [N, C, D, H, W]."""


class PackedConvTranspose1d(PackedTransposedConvolution, nn.ConvTranspose1d):  # type: ignore[misc]
    """x [N, C, L]."""


class PackedConvTranspose2d(PackedTransposedConvolution, nn.ConvTranspose2d):  # type: ignore[misc]
    """x [N, C, H, W]."""


class PackedConvTranspose3d(PackedTransposedConvolution, nn.ConvTranspose3d):  # type: ignore[misc]
    """x [N, C, D, H, W]."""
