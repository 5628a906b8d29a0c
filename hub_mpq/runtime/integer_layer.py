"""A quantized layer in the form that integer engines need: codes, scales, and the range of their sums."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core import LayerBits, LayerSpec
from ..core.layer_kind import layer_kinds
from ..nn.convolutions import convolution_of, same_pads
from ..nn.packed import PackedLayer
from ..nn.packing import packed_weight

_KINDS = ("conv2d", "linear", "projection", "conv1d")
_FLOAT_INPUT = "its input is not quantized"
INT16 = 2**15 - 1
INT32 = 2**31 - 1


@dataclass(frozen=True)
class Grid:
    """The codes of an input: clamp(round(x / scale) + zero_point, 0, 2^bits - 1), unsigned."""

    scale: float
    zero_point: int
    bits: int

    @property
    def top(self) -> int:
        """The largest code."""
        return 2**self.bits - 1


@dataclass(frozen=True, eq=False)
class IntegerLayer:
    """Output = (codes of the input - zero point) · codes of the weight · scales + bias.

    Args:
        name: Name of the layer.
        weight: int8 codes, [out, in / groups, height, width] or [out, in].
        weight_bits: Bit-width of the weight, 1 to 8.
        scale: Scale of the weight, float32 [out].
        bias: float32 [out], or None.
        grid: Grid of the input.
        stride: Stride of a convolution; None for a linear layer.
        padding: Padding of a convolution.
        dilation: Dilation of a convolution.
        groups: Groups of a convolution.
        same: Whether the input is padded as TensorFlow's SAME before the convolution (`padded`).
    """

    name: str
    weight: Tensor
    weight_bits: int
    scale: Tensor
    bias: Tensor | None
    grid: Grid
    stride: tuple[int, ...] | None = None
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1
    same: bool = False

    @property
    def convolution(self) -> bool:
        """Whether it is a convolution."""
        return self.stride is not None

    def largest_sum(self) -> int:
        """The largest absolute sum of products of one output that is possible with the stored codes."""
        flat = self.weight.flatten(1).long()
        high, low = flat.clamp(min=0).sum(1).max(), -flat.clamp(max=0).sum(1).min()
        return self.grid.top * int(max(high, low))

    def largest_pair(self) -> int:
        """The largest absolute sum of two products of one output, which CPUs without VNNI hold in 16 bits.

        Any two weights are considered, because the engine chooses which two share an instruction.
        """
        flat = self.weight.flatten(1).long()
        ends = flat.sort(1).values
        count = min(2, flat.shape[1])
        return self.grid.top * int(max(ends[:, -count:].sum(1).max(), -ends[:, :count].sum(1).min()))

    def padded(self, x: Tensor, zero: int = 0) -> Tensor:
        """Pad the input of a convolution if `same` is set.

        Args:
            x: [N, C, H, W], codes or floats.
            zero: The value that represents zero.
        """
        if not self.same:
            return x
        return F.pad(x, same_pads(x.shape[2:], self.weight.shape[2:], self.stride, self.dilation), value=zero)

    def output_shape(self, size: Sequence[int]) -> tuple[int, ...]:
        """The shape of the output.

        Args:
            size: The shape of the input.
        """
        if not self.convolution:
            return (*size[:-1], len(self.weight))
        kernel, sides = self.weight.shape[2:], size[-2:]
        if self.same:
            found = [-(-n // s) for n, s in zip(sides, self.stride, strict=True)]
        else:
            rules = zip(sides, kernel, self.stride, self.padding, self.dilation, strict=True)
            found = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in rules]
        return (*size[:-3], len(self.weight), *found)

    def times(self, factor: Tensor, bias: Tensor) -> IntegerLayer:
        """Fold output · factor + bias into the layer, as for a BatchNorm in evaluation mode.

        Args:
            factor: [out].
            bias: [out].
        """
        old = 0 if self.bias is None else self.bias * factor
        return replace(self, scale=self.scale * factor, bias=old + bias)


def inexact_sums(layer: IntegerLayer, saturates: bool) -> str | None:
    """Why the sums of a layer would not be exact; None if they are.

    Args:
        layer: The layer, with its stored codes.
        saturates: Whether the engine sums two products in 16 bits, as the instructions of CPUs without VNNI do.
    """
    if layer.largest_sum() > INT32:
        return "its sums of products can exceed 32 bits"
    if saturates and layer.largest_pair() > INT16:
        widths = f"{layer.grid.bits}-bit inputs and {layer.weight_bits}-bit weights"
        return f"on a CPU without VNNI, sums of two products of {widths} saturate"
    return None


def integer_menu(layer: LayerSpec, saturates: bool) -> tuple[LayerBits, ...]:
    """All bit-widths at which a layer's sums are exact whatever its codes, ascending.

    Args:
        layer: The layer.
        saturates: As in `inexact_sums`.
    """
    if layer.kind not in _KINDS:
        return ()
    outputs = layer.weight_shape[1 if layer.kind == "conv1d" else 0]
    products = prod(layer.weight_shape) // outputs  # that one output adds up
    pairs = [LayerBits(w, a) for w in range(1, 9) for a in range(1, 9)]

    def exact(bits: LayerBits) -> bool:
        largest = 2 ** (bits.weight - 1) * (2**bits.activation - 1)
        return products * largest <= INT32 and not (saturates and min(products, 2) * largest > INT16)

    return tuple(sorted(bits for bits in pairs if exact(bits)))


def layer_form(module: nn.Module) -> str | None:
    """The kind of a quantized or packed layer; None for all other modules."""
    if isinstance(module, PackedLayer):
        return module.kind
    return next((kind.name for kind in layer_kinds if type(module) is kind.quantized_class), None)


@torch.no_grad()
def integer_layer(name: str, module: nn.Module) -> IntegerLayer | str:
    """Convert a quantized or packed layer to integers.

    Args:
        name: Name of the layer.
        module: The layer, in either form.

    Returns:
        The layer, or the reason why it has no integer form.
    """
    kind = layer_form(module)
    if kind not in _KINDS:
        return f"{kind} layers have no integer form" if module.input_quantizer is not None else _FLOAT_INPUT
    found = _grid(module)
    if isinstance(found, str):
        return found
    packed = module.packed if isinstance(module, PackedLayer) else packed_weight(module, kind)
    if packed.bits.grouped:
        return "its weights have group scales"
    weight = packed.unpack()
    if kind == "conv1d":
        weight = weight.t().contiguous()
    scale = packed.weight_scale.float().expand(len(weight)).clone()
    bias = None if module.bias is None else module.bias.detach().float()
    layer = IntegerLayer(name, weight, packed.num_bits, scale, bias, found)
    if kind != "conv2d":
        return layer
    if module.same_padding:
        where = {"stride": module.stride, "dilation": module.dilation, "groups": module.groups}
        return replace(layer, **where, padding=(0, 0), same=True)
    convolution = convolution_of(module)
    if convolution is None:
        return "its padding is not supported in integers"
    stride, padding, dilation, groups, _ = convolution
    return replace(layer, stride=stride, padding=padding, dilation=dilation, groups=groups)


def integer_layers(model: nn.Module) -> tuple[dict[str, IntegerLayer], dict[str, str]]:
    """({name: layer} of all layers with an integer form, {name: reason} of the other quantized layers)."""
    found, kept = {}, {}
    for name, module in model.named_modules():
        if layer_form(module) is None:
            continue
        layer = integer_layer(name, module)
        if isinstance(layer, str):
            kept[name] = layer
        else:
            found[name] = layer
    return found, kept


def _grid(module: nn.Module) -> Grid | str:
    """The grid of a layer's input, or the reason why it has none."""
    if isinstance(module, PackedLayer):
        if module.input_quantizer is None:
            return _FLOAT_INPUT
        zero = module._buffers.get("input_zero_point")
        grid = Grid(float(module._buffers["input_scale"]), 0 if zero is None else int(zero), module.bits.activation)
    else:
        quantizer = module.input_quantizer
        if quantizer is None or quantizer.spec is None:
            return _FLOAT_INPUT
        grid = Grid(float(quantizer.scale), quantizer.zero_point, quantizer.spec.num_bits)
    if not 0 <= grid.zero_point <= grid.top:
        return f"its input range does not contain zero (zero point {grid.zero_point})"
    return grid
