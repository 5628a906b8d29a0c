"""A quantized model as ONNX with QuantizeLinear / DequantizeLinear nodes, for ONNX Runtime.

Weights are stored as INT4 up to 4 bits and as INT8 above; activations as UINT8, clipped to their own width first: a
narrower type would save nothing at run time. The values are the same as here, so only the float sums differ.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..adapters.restore_state import copied
from ..errors import HubMPQError
from ..nn.quantize import quantized_layers
from ..pack import Manifest
from ..pack.atomic import write_atomic

FILE = "model.onnx"
OPSET = 21
"""The first with INT4."""


def _op(name: str, inputs: tuple[Tensor, ...], like: Tensor, dtype: torch.dtype, **attributes: int) -> Tensor:
    out: Tensor = torch.onnx.ops.symbolic(name, inputs, attributes, dtype=dtype, shape=like.shape, version=OPSET)
    return out


class _Weight(nn.Module):
    """integers · scale, as a DequantizeLinear. Stands in a layer's `weight_quantizer`; the float weight is unused."""

    def __init__(self, integers: Tensor, scale: Tensor, axis: int) -> None:
        super().__init__()
        self.axis = axis if scale.numel() > 1 else None
        self.register_buffer("integers", integers)
        self.register_buffer("scale", scale if scale.numel() > 1 else scale.reshape(()))

    def forward(self, weight: Tensor) -> Tensor:
        axis = {} if self.axis is None else {"axis": self.axis}
        return _op("DequantizeLinear", (self.integers, self.scale), self.integers, torch.float32, **axis)


class _Input(nn.Module):
    """Clip to the range of the width, then QuantizeLinear and DequantizeLinear."""

    def __init__(self, scale: float, zero_point: int, bits: int) -> None:
        super().__init__()
        self.low, self.high = -zero_point * scale, (2**bits - 1 - zero_point) * scale
        self.clip = bits < 8  # UINT8 itself saturates at 8 bits
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32))
        self.register_buffer("zero_point", torch.tensor(zero_point, dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        if self.clip:
            x = x.clamp(self.low, self.high)
        q = _op("QuantizeLinear", (x, self.scale, self.zero_point), x, torch.uint8)
        return _op("DequantizeLinear", (q, self.scale, self.zero_point), x, torch.float32)


def export_onnx(
    folder: str | os.PathLike[str], model: nn.Module, manifest: Manifest, config: Mapping[str, Any], example: Any
) -> int:
    """Write `model.onnx` (opset 21, batch size free) of a model with quantizers; returns its bytes.

    example: one sample, a tuple of positional arguments or a mapping of keyword arguments. Needs the extra "onnx".
    Raises HubMPQError when it is not installed, or when the model can't be traced.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise HubMPQError(f"ONNX needs pip install 'hub-mpq[onnx]' ({error})") from error
    net, narrow = _with_nodes(model)
    example = tree_map(lambda x: torch.cat([x, x]) if isinstance(x, Tensor) and x.dim() else x, example)  # 1 is special
    args, kwargs = ((), dict(example)) if isinstance(example, Mapping) else (tuple(example), {})
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with torch.no_grad():
            program = torch.onnx.export(
                net, args, kwargs=kwargs, dynamo=True, opset_version=OPSET, dynamic_shapes=_free(args, kwargs)
            )
    except Exception as error:
        cause = error.__cause__ or error
        first = str(cause).strip().partition("\n")[0]
        raise HubMPQError(f"torch.onnx can't trace {type(model).__name__}: {first}") from error
    proto = program.model_proto  # type: ignore[union-attr]
    for initializer in proto.graph.initializer:
        if initializer.name in narrow:
            _to_int4(onnx, initializer)
    for part in (proto, proto.graph, *proto.graph.node, *proto.graph.value_info, *proto.graph.initializer):
        del part.metadata_props[:]  # stack traces with paths of this machine
        part.ClearField("doc_string")
    onnx.checker.check_model(proto)
    return write_atomic(folder / FILE, [proto.SerializeToString()])


def _with_nodes(model: nn.Module) -> tuple[nn.Module, set[str]]:
    """A copy whose quantizers are ONNX nodes; the names of the weights that fit INT4."""
    net = copied(model).eval()
    if hasattr(net, "config"):
        net.config.use_cache = False  # a cache is an object, no tensor
    made: dict[nn.Module, _Weight] = {}  # a tied head shares its quantizer
    narrow: set[str] = set()
    for name, module in quantized_layers(net):
        quantizer = module.weight_quantizer
        if quantizer not in made:
            integers = quantizer.to_int(module.weight).to(torch.int8)
            made[quantizer] = _Weight(integers, quantizer.scale.detach().float().clone(), quantizer.axis)
        module.weight_quantizer = made[quantizer]
        if quantizer.spec.num_bits <= 4:
            narrow.add(f"{name}.weight_quantizer.integers")
        if (old := module.input_quantizer) is not None:
            if not 0 <= old.zero_point <= 255:
                raise HubMPQError(f"layer {name!r}: zero point {old.zero_point} is no UINT8")
            module.input_quantizer = _Input(float(old.scale.detach()), old.zero_point, old.spec.num_bits)
    return net, narrow


def _free(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The first axis of every tensor is the batch; the second one of token ids is free where the model lets it."""
    batch, tokens = torch.export.Dim.DYNAMIC, torch.export.Dim.AUTO

    def axes(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.dim():
            return None
        return {0: batch, 1: tokens} if x.dim() == 2 and not x.is_floating_point() else {0: batch}

    return {k: axes(v) for k, v in kwargs.items()} if kwargs else tuple(axes(x) for x in args)


def _to_int4(onnx: Any, initializer: Any) -> None:
    """Store an INT8 initializer as INT4, two values a byte, the first in the lower half."""
    values = onnx.numpy_helper.to_array(initializer).reshape(-1).astype("int16") & 15
    if len(values) % 2:
        values = [*values, 0]
    pairs = torch.as_tensor(values).view(-1, 2)
    initializer.raw_data = (pairs[:, 0] | pairs[:, 1] << 4).to(torch.uint8).numpy().tobytes()
    initializer.data_type = onnx.TensorProto.INT4
