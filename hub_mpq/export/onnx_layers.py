"""Quantized layers as ONNX nodes: QuantizeLinear and DequantizeLinear around the layer's own operator."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..adapters.restore_state import copied_structure
from ..core.layer_kind import layer_kinds
from ..nn.layers import QuantConv1D, QuantEmbedding, QuantLinear, first_operand, operands, replace_layer, scaled
from ..nn.packed import PackedLayer, float_layer
from ..nn.packing import packed_weight
from ..nn.quantize import quantize_layer
from ..pack import PackedTensor

OPSET = 21


def _op(name: str, inputs: tuple[Tensor, ...], like: Tensor, dtype: torch.dtype, **attributes: int) -> Tensor:
    out: Tensor = torch.onnx.ops.symbolic(name, inputs, attributes, dtype=dtype, shape=like.shape, version=OPSET)
    return out


class _IntegerWeight(nn.Module):
    """integers · scale, as DequantizeLinear. Replaces a layer's `weight_quantizer`; the float weight is unused."""

    def __init__(self, integers: Tensor, scale: Tensor, axis: int) -> None:
        super().__init__()
        self.axis = axis if scale.numel() > 1 else None
        self.register_buffer("integers", integers)
        self.register_buffer("scale", scale if scale.numel() > 1 else scale.reshape(()))

    def forward(self, weight: Tensor) -> Tensor:
        axis = {} if self.axis is None else {"axis": self.axis}
        return _op("DequantizeLinear", (self.integers, self.scale), self.integers, torch.float32, **axis)


class _FloatWeight(nn.Module):
    """A weight on its grid, float32."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("values", weight)

    def forward(self, weight: Tensor) -> Tensor:
        values: Tensor = self.values
        return values


class _IntegerInput(nn.Module):
    """QuantizeLinear and DequantizeLinear, with a Clip to the range of the bit-width.

    The Clip is before them, or on the codes between them, which keeps QuantizeLinear next to the input's producer.
    """

    def __init__(self, scale: float, zero_point: int, bits: int, clip_codes: bool) -> None:
        super().__init__()
        self.top, self.clip_codes = 2**bits - 1, clip_codes
        self.low, self.high = -zero_point * scale, (self.top - zero_point) * scale
        self.clip = bits < 8  # UINT8 itself saturates at 8 bits
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32))
        self.register_buffer("zero_point", torch.tensor(zero_point, dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        if self.clip and not self.clip_codes:
            x = x.clamp(self.low, self.high)
        q = _op("QuantizeLinear", (x, self.scale, self.zero_point), x, torch.uint8)
        if self.clip and self.clip_codes:
            q = q.clamp(0, self.top)
        return _op("DequantizeLinear", (q, self.scale, self.zero_point), x, torch.float32)


class _FloatInput(nn.Module):
    """The same values with float operators: if the zero point does not fit UINT8, or codes would mislead an engine."""

    def __init__(self, scale: float, zero_point: int, bits: int) -> None:
        super().__init__()
        self.scale, self.low, self.high = scale, float(-zero_point), float(2**bits - 1 - zero_point)

    def forward(self, x: Tensor) -> Tensor:
        return (x / self.scale).round().clamp(self.low, self.high) * self.scale


class _Product(QuantLinear):
    """Separate product and sum: engines compute a MatMul of quantized operands in integers, but not a Gemm."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        x, weight = operands(self, first_operand(args, kwargs))
        y = x @ weight.t()
        return y if self.bias is None else y + self.bias


class _Conv1D(QuantConv1D):
    """The same for GPT-2's layer."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        x, weight = operands(self, first_operand(args, kwargs))
        return x @ weight + self.bias


class _IntegerRows(QuantEmbedding):
    """Gathers rows of integers and multiplies them by their scale, so that the whole table is never float."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        ids, table = first_operand(args, kwargs), self.weight_quantizer
        scale = table.scale if table.axis is None else F.embedding(ids, table.scale[:, None])
        return scaled(self, F.embedding(ids, table.integers).float() * scale)


@torch.no_grad()
def with_nodes(
    model: nn.Module, floats: Collection[str] = (), *, clip_codes: bool = False, rounds: bool = False
) -> tuple[nn.Module, dict[str, tuple[int, int]], dict[str, str]]:
    """Copy a quantized model so that torch.onnx exports it with QuantizeLinear and DequantizeLinear nodes.

    Args:
        model: The network, with quantizers or packed weights, on the CPU; it is not changed, and float tensors are
            shared.
        floats: Layers to write in float, with the same values.
        clip_codes: See `onnx_graph`.
        rounds: See `onnx_graph`.

    Returns:
        (the copy, {layer with integer inputs and weights: bits of its weight and its input}, {layer that no engine can
        compute in integers: reason}).
    """
    net = copied_structure(model).eval()
    if hasattr(net, "config"):
        net.config.use_cache = False  # a cache is an object, not a tensor
        # plain products and an additive mask: the fused form adds two nodes of the size of the scores
        net.config._attn_implementation = "eager"
    kinds = {kind.quantized_class: kind for kind in layer_kinds if kind.name in _KINDS}
    kinds |= {kind.packed_class: kind for kind in layer_kinds if kind.name in _KINDS}
    layers = [(name, module, kinds[type(module)]) for name, module in net.named_modules() if type(module) in kinds]
    contents = {name: (*_packed(module, kind.name), _grid(module)) for name, module, kind in layers}
    made: dict[Any, nn.Module] = {}  # a tied head shares its weight
    widths: dict[str, tuple[int, int]] = {}
    kept: dict[str, str] = {}
    for name, module, kind in layers:
        packed, source, grid = contents[name]
        why = _why_float(packed, grid, kind.name)
        if why is not None and kind.name != "embedding":  # an embedding computes nothing
            kept[name] = why
        elif grid is not None:
            widths[name] = packed.num_bits, grid[2]
        # a float weight is enough to keep engines from computing in integers
        in_float = name in floats or (why is not None and grid is not None)
        if (key := (source, in_float)) not in made:
            made[key] = _weight(packed, kind, in_float)
        inputs = None
        if grid is not None:
            by_float = not 0 <= grid[1] <= 255 or (in_float and rounds)
            inputs = _FloatInput(*grid) if by_float else _IntegerInput(*grid, clip_codes)
        if isinstance(module, PackedLayer):
            stand_in = nn.Parameter(torch.full((), torch.nan).expand(module.shape), requires_grad=False)
            replace_layer(
                net, name, quantize_layer(float_layer(module, torch.float32, stand_in), name, made[key], inputs)
            )
        else:
            module.weight_quantizer, module.input_quantizer = made[key], inputs
        if kind.name == "embedding" and isinstance(made[key], _IntegerWeight):
            module.__class__ = _IntegerRows
        if kind.name in ("linear", "conv1d"):
            module.__class__ = _Product if kind.name == "linear" else _Conv1D
    return net, widths, kept


_INTEGER_KINDS = ("conv2d", "linear", "conv1d", "embedding")
_KINDS = (*_INTEGER_KINDS, "convolution1d", "convolution3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")


def _packed(module: Any, kind: str) -> tuple[PackedTensor, Any]:
    """(the packed weight of a layer, an object that layers with the same weight share)."""
    if isinstance(module, PackedLayer):
        return module.packed, module.source
    return packed_weight(module, kind), module.weight_quantizer


def _weight(packed: PackedTensor, kind: Any, in_float: bool) -> nn.Module:
    if in_float or packed.bits.grouped:
        return _FloatWeight(packed.dequantize(torch.float32))
    return _IntegerWeight(packed.unpack(), packed.weight_scale.float().clone(), kind.channel_axis)


def _grid(module: Any) -> tuple[float, int, int] | None:
    """(scale, zero point, bits) of a layer's input; None if it is float."""
    if isinstance(module, PackedLayer):
        if module.input_quantizer is None:
            return None
        zero = module._buffers.get("input_zero_point")
        return float(module._buffers["input_scale"]), 0 if zero is None else int(zero), module.bits.activation
    quantizer = module.input_quantizer
    if quantizer is None or quantizer.spec is None:
        return None
    return float(quantizer.scale.detach()), quantizer.zero_point, quantizer.spec.num_bits


def _why_float(packed: PackedTensor, grid: tuple[float, int, int] | None, kind: str) -> str | None:
    if packed.bits.grouped:
        return "its weights have group scales"
    if grid is None:
        return "its input is not quantized"
    if kind not in _INTEGER_KINDS:
        return f"{kind} layers have no integer form"
    if not 0 <= grid[1] <= 2 ** grid[2] - 1:
        return f"its input range does not contain zero (zero point {grid[1]})"
    return None
