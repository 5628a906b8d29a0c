"""Which tensors a packed file contains for a policy, and whether they agree with it."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..core import FLOAT_BITS, LayerBits, LayerSpec
from ..cost.size import packed_shape
from ..errors import InvalidArgument
from .manifest import Manifest
from .tensor import GROUP_SCALES, PackedTensor

WEIGHT_PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
INPUT_PARTS = ("input_scale", "input_zero_point")
_MOST_ZERO = 2**24  # float32 holds every integer up to here


def key(layer: str, part: str) -> str:
    """Name on disk of a part of a layer; if the model is a single layer, the layer's name is empty."""
    return f"{layer}.{part}" if layer else part


def packed_layers(manifest: Manifest) -> dict[str, LayerSpec]:
    """Layers whose weight is packed: neither float nor another layer's."""
    bits = manifest.policy.bits
    return {
        layer.name: layer
        for layer in manifest.graph
        if layer.weight_owner is None and bits[layer.name].weight != FLOAT_BITS
    }


def flatten(tensors: Mapping[str, PackedTensor | Tensor]) -> dict[str, Tensor]:
    """{name on disk: tensor}; raises InvalidArgument if a name occurs twice."""
    flat: dict[str, Tensor] = {}
    for name, value in tensors.items():
        parts = (
            {key(name, k): v for k, v in value.parts().items()} if isinstance(value, PackedTensor) else {name: value}
        )
        if twice := flat.keys() & parts.keys():
            raise InvalidArgument(f"tensor {min(twice)!r} occurs twice")
        flat |= parts
    return flat


def assemble(flat: Mapping[str, Tensor], manifest: Manifest) -> dict[str, PackedTensor | Tensor]:
    """Combine the tensors of packed layers into PackedTensors; other tensors are returned unchanged.

    Raises:
        InvalidArgument: The tensors are not exactly those of the policy, with its shapes and bit-widths, or a scale is
            not finite and positive; the error names the tensor.
    """
    packed = packed_layers(manifest)
    _check_names(flat, manifest, packed)
    out: dict[str, PackedTensor | Tensor] = {}
    for name, layer in packed.items():
        out[name] = _packed(flat, layer, manifest.policy.bits[name])
    for layer in manifest.graph:
        if manifest.policy.bits[layer.name].activation != FLOAT_BITS:
            _check_input(flat, layer.name)
    taken = {key(name, part) for name in packed for part in WEIGHT_PARTS}
    return out | {name: tensor for name, tensor in flat.items() if name not in taken}


def _check_names(flat: Mapping[str, Tensor], manifest: Manifest, packed: Mapping[str, LayerSpec]) -> None:
    bits = manifest.policy.bits
    for name, tensor in flat.items():
        layer, _, part = name.rpartition(".")
        if part in WEIGHT_PARTS and layer not in packed:
            raise InvalidArgument(f"unexpected tensor {name!r}: the policy does not pack the weight of layer {layer!r}")
        if part in INPUT_PARTS and (layer not in bits or bits[layer].activation == FLOAT_BITS):
            raise InvalidArgument(f"unexpected tensor {name!r}: the policy does not quantize the input of {layer!r}")
        if part == "weight" and layer in packed and tensor.numel():
            raise InvalidArgument(f"unexpected tensor {name!r}: the weight of layer {layer!r} is packed")


def _part(flat: Mapping[str, Tensor], layer: str, part: str) -> Tensor:
    if key(layer, part) not in flat:
        raise InvalidArgument(f"tensor {key(layer, part)!r} is missing")
    return flat[key(layer, part)]


def _check_scale(name: str, scale: Tensor, *, of_groups: bool = False) -> None:
    dtypes = GROUP_SCALES if of_groups else (torch.float32,)
    if scale.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise InvalidArgument(f"tensor {name!r}: scales must be {names}, got {scale.dtype}")
    if not scale.is_meta and not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise InvalidArgument(f"tensor {name!r}: scales must be finite and positive")


def _packed(flat: Mapping[str, Tensor], layer: LayerSpec, bits: LayerBits) -> PackedTensor:
    shape = _part(flat, layer.name, "weight_shape")
    whole = shape.dtype == torch.int64 and shape.dim() == 1
    found = None if not whole else layer.weight_shape if shape.is_meta else tuple(shape.tolist())
    if found != layer.weight_shape:
        raise InvalidArgument(f"tensor {key(layer.name, 'weight_shape')!r}: expected {layer.weight_shape}, got {found}")
    words = _part(flat, layer.name, "weight_packed")
    want = packed_shape(layer.kind, layer.weight_shape, bits.weight)
    if words.dtype != torch.int32 or tuple(words.shape) != want:
        raise InvalidArgument(
            f"tensor {key(layer.name, 'weight_packed')!r}: expected torch.int32 {want} at the policy's "
            f"{bits.weight} bits, got {words.dtype} {tuple(words.shape)}"
        )
    scale = _part(flat, layer.name, "weight_scale")
    _check_scale(key(layer.name, "weight_scale"), scale, of_groups=bits.group_size is not None)
    zero = flat.get(key(layer.name, "weight_zero_point"))
    if not bits.symmetric:
        zero = _part(flat, layer.name, "weight_zero_point")
    try:
        packed = PackedTensor(words, scale, layer.weight_shape, bits.weight, layer.kind, zero, bits.group_size)
    except InvalidArgument as error:
        raise InvalidArgument(f"layer {layer.name!r}: {error}") from None
    if packed.bits != bits.of_weight:
        name = key(layer.name, "weight_zero_point")
        raise InvalidArgument(f"tensor {name!r}: expected {bits.of_weight} as in the policy, got {packed.bits}")
    return packed


def _check_input(flat: Mapping[str, Tensor], layer: str) -> None:
    scale = _part(flat, layer, "input_scale")
    _check_scale(key(layer, "input_scale"), scale)
    zero = flat.get(key(layer, "input_zero_point"), torch.zeros(1, dtype=torch.int32))
    for part, tensor in zip(INPUT_PARTS, (scale, zero), strict=True):
        if math.prod(tensor.shape) != 1:
            raise InvalidArgument(f"tensor {key(layer, part)!r}: expected one value, got shape {tuple(tensor.shape)}")
    name = key(layer, "input_zero_point")
    if zero.dtype.is_floating_point or zero.dtype == torch.bool:
        raise InvalidArgument(f"tensor {name!r}: a zero point must be an integer, got {zero.dtype}")
    if not zero.is_meta and abs(int(zero)) > _MOST_ZERO:
        raise InvalidArgument(f"tensor {name!r}: the zero point must be within ±{_MOST_ZERO}, got {int(zero)}")
