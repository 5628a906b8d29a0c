"""Convolutions with quantizers, ordinary and transposed, over one to three axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from .fused import Convolution
from .layers import first_operand, fused_output, operands


def convolution_of(layer: Any) -> Convolution | None:
    """An ordinary convolution as one operation; None if its input is padded separately."""
    if layer.same_padding or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return None
    return Convolution(layer.stride, layer.padding, layer.dilation, layer.groups)


def transposed_convolution_of(layer: Any, x: Tensor, output_size: Sequence[int] | None) -> Convolution:
    """A transposed convolution of `x` as one operation; `output_size` as torch.nn.ConvTranspose2d takes it."""
    axes = len(layer.kernel_size)
    extra = layer._output_padding(x, output_size, layer.stride, layer.padding, layer.kernel_size, axes, layer.dilation)
    return Convolution(layer.stride, layer.padding, layer.dilation, layer.groups, tuple(extra))


def same_pads(size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """The padding of TensorFlow's SAME, in the order of torch.nn.functional.pad.

    Args:
        size: Of the image, one value per axis, height before width.
        kernel: One value per axis.
        stride: One value per axis.
        dilation: One value per axis.
    """
    pads: list[int] = []
    for axis in reversed(range(len(size))):  # pad wants the last axis first
        span = (-(-size[axis] // stride[axis]) - 1) * stride[axis] + (kernel[axis] - 1) * dilation[axis] + 1
        pad = max(span - size[axis], 0)
        pads += [pad // 2, pad - pad // 2]
    return pads


class SpatialLayer(nn.Module):
    """Base of quantized and packed convolutions."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    float_class: type[nn.Module]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Return a float layer if called with arguments: PEFT builds an adapter's convolutions of the adapted type."""
        if not (args or kwargs):
            return object.__new__(cls)
        return next(base for base in cls.__mro__ if base.__module__ == nn.Conv2d.__module__)(*args, **kwargs)

    @property
    def same_padding(self) -> bool:
        """Whether the input is padded as in TensorFlow's SAME, by timm's Conv2dSame."""
        return self.float_class.__name__ == "Conv2dSame"

    @property
    def batched_axes(self) -> int:
        """Number of axes of an input with a batch axis; a single sample takes the plain path."""
        return len(self.kernel_size) + 2

    def convolve(self, x: Tensor) -> Tensor:
        """An ordinary convolution, composed of separate operations."""
        x, weight = operands(self, x)
        bias = self._parameters.get("bias")
        if not self.same_padding:
            out: Tensor = self._conv_forward(x, weight, bias)  # type: ignore[operator]
            return out
        pads = same_pads(x.shape[-len(self.kernel_size) :], self.kernel_size, self.stride, self.dilation)
        plain = Convolution(self.stride, (0,) * len(self.stride), self.dilation, self.groups)
        return plain.run(F.pad(x, pads), weight, bias)


class QuantConvolution(SpatialLayer):
    """An ordinary convolution, x [N, C, …] or [C, …]."""

    weight_quantizer: Any
    input_quantizer: Any

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        x = first_operand(args, kwargs)
        out = fused_output(self, convolution_of(self), x) if x.dim() == self.batched_axes else None
        return self.convolve(x) if out is None else out


class QuantTransposedConvolution(SpatialLayer):
    """A transposed convolution, x [N, C, …] or [C, …]; weight [in, out/groups, …]."""

    weight_quantizer: Any
    input_quantizer: Any

    def forward(self, *args: Any, output_size: Sequence[int] | None = None, **kwargs: Any) -> Tensor:
        x = first_operand(args, kwargs)
        operation = transposed_convolution_of(self, x, args[1] if len(args) > 1 else output_size)
        out = fused_output(self, operation, x) if x.dim() == self.batched_axes else None
        if out is not None:
            return out
        x, weight = operands(self, x)
        return operation.run(x, weight, self._parameters.get("bias"))


class QuantConv1d(QuantConvolution, nn.Conv1d):  # type: ignore[misc]
    """x [N, C, L]."""


class QuantConv2d(QuantConvolution, nn.Conv2d):  # type: ignore[misc]
    """x [N, C, H, W]."""


class QuantConv3d(QuantConvolution, nn.Conv3d):  # type: ignore[misc]
    """x [N, C, D, H, W]."""


class QuantConvTranspose1d(QuantTransposedConvolution, nn.ConvTranspose1d):  # type: ignore[misc]
    """x [N, C, L]."""


class QuantConvTranspose2d(QuantTransposedConvolution, nn.ConvTranspose2d):  # type: ignore[misc]
    """x [N, C, H, W]."""


class QuantConvTranspose3d(QuantTransposedConvolution, nn.ConvTranspose3d):  # type: ignore[misc]
    """x [N, C, D, H, W]."""
