"""Convolutions with quantizers, ordinary and transposed ones, over one to three axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from .fused import Convolution
from .layers import first_operand, fused_output, operands


def convolution_of(layer: Any) -> Convolution | None:
    """An ordinary convolution as one operation; None when its input is padded apart from it."""
    if layer.same_padding or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return None
    return Convolution(layer.stride, layer.padding, layer.dilation, layer.groups)


def transposed_convolution_of(layer: Any, x: Tensor, output_size: Sequence[int] | None) -> Convolution:
    """A transposed convolution of `x` as one operation; `output_size` as torch.nn.ConvTranspose2d takes it."""
    axes = len(layer.kernel_size)
    extra = layer._output_padding(x, output_size, layer.stride, layer.padding, layer.kernel_size, axes, layer.dilation)
    return Convolution(layer.stride, layer.padding, layer.dilation, layer.groups, tuple(extra))


def same_pads(size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """What TensorFlow's SAME puts around an image, as torch.nn.functional.pad takes it.

    Args:
        size, kernel, stride, dilation: One for each axis, height before width.
    """
    pads: list[int] = []
    for axis in reversed(range(len(size))):  # pad wants the last axis first
        span = (-(-size[axis] // stride[axis]) - 1) * stride[axis] + (kernel[axis] - 1) * dilation[axis] + 1
        pad = max(span - size[axis], 0)
        pads += [pad // 2, pad - pad // 2]
    return pads


class SpatialLayer(nn.Module):
    """What quantized and packed convolutions share."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    float_class: type[nn.Module]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """The float layer where one is constructed: PEFT makes an adapter's convolutions of the type that it adapts."""
        if not (args or kwargs):
            return object.__new__(cls)
        return next(base for base in cls.__mro__ if base.__module__ == nn.Conv2d.__module__)(*args, **kwargs)

    @property
    def same_padding(self) -> bool:
        """Whether the input is padded to TensorFlow's SAME, as timm's Conv2dSame computes it."""
        return self.float_class.__name__ == "Conv2dSame"

    @property
    def batched_axes(self) -> int:
        """Axes of an input with a batch axis; one sample without it goes the plain way."""
        return len(self.kernel_size) + 2

    def convolve(self, x: Tensor) -> Tensor:
        """An ordinary convolution, put together from its parts."""
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
