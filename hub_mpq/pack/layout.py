"""Which tensors a packed file holds for a policy, and whether they agree with it."""

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
    """Name on disk of a part of a layer; the layer of a model that is one layer has no name."""
    return f"{layer}.{part}" if layer else part


def packed_layers(manifest: Manifest) -> dict[str, LayerSpec]:
    """Layers whose weight the policy packs: not float, and not another layer's."""
    bits = manifest.policy.bits
    return {
        layer.name: layer
        for layer in manifest.graph
        if layer.weight_owner is None and bits[layer.name].weight != FLOAT_BITS
    }


def flatten(tensors: Mapping[str, PackedTensor | Tensor]) -> dict[str, Tensor]:
    """{name on disk: tensor}; InvalidArgument when two have one name."""
    flat: dict[str, Tensor] = {}
    for name, value in tensors.items():
        parts = (
            {key(name, k): v for k, v in value.parts().items()} if isinstance(value, PackedTensor) else {name: value}
        )
        if twice := flat.keys() & parts.keys():
            raise InvalidArgument(f"tensor {min(twice)!r} is given twice")
        flat |= parts
    return flat


def assemble(flat: Mapping[str, Tensor], manifest: Manifest) -> dict[str, PackedTensor | Tensor]:
    """PackedTensors of the layers the policy packs, every other tensor as it is.

    InvalidArgument, naming the tensor, unless the tensors are exactly those the policy speaks of, with its shapes
    and widths, and every scale is finite and above zero.
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
            raise InvalidArgument(f"tensor {name!r}: the policy packs no weight of layer {layer!r}")
        if part in INPUT_PARTS and (layer not in bits or bits[layer].activation == FLOAT_BITS):
            raise InvalidArgument(f"tensor {name!r}: the policy quantizes no input of layer {layer!r}")
        if part == "weight" and layer in packed and tensor.numel():
            raise InvalidArgument(f"tensor {name!r}: a float weight beside the packed one")


def _part(flat: Mapping[str, Tensor], layer: str, part: str) -> Tensor:
    if key(layer, part) not in flat:
        raise InvalidArgument(f"tensor {key(layer, part)!r} is missing")
    return flat[key(layer, part)]


def _check_scale(name: str, scale: Tensor, *, of_groups: bool = False) -> None:
    dtypes = GROUP_SCALES if of_groups else (torch.float32,)
    if scale.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise InvalidArgument(f"tensor {name!r}: a scale is {names}, not {scale.dtype}")
    if not scale.is_meta and not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise InvalidArgument(f"tensor {name!r}: scales must be finite and above zero")


def _packed(flat: Mapping[str, Tensor], layer: LayerSpec, bits: LayerBits) -> PackedTensor:
    shape = _part(flat, layer.name, "weight_shape")
    whole = shape.dtype == torch.int64 and shape.dim() == 1
    found = None if not whole else layer.weight_shape if shape.is_meta else tuple(shape.tolist())
    if found != layer.weight_shape:
        raise InvalidArgument(f"tensor {key(layer.name, 'weight_shape')!r}: {found}, expected {layer.weight_shape}")
    words = _part(flat, layer.name, "weight_packed")
    want = packed_shape(layer.kind, layer.weight_shape, bits.weight)
    if words.dtype != torch.int32 or tuple(words.shape) != want:
        raise InvalidArgument(
            f"tensor {key(layer.name, 'weight_packed')!r}: {words.dtype} {tuple(words.shape)}, "
            f"expected int32 {want} at the policy's {bits.weight} bits"
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
        raise InvalidArgument(f"tensor {name!r}: of {packed.bits}, the policy says {bits.of_weight}")
    return packed


def _check_input(flat: Mapping[str, Tensor], layer: str) -> None:
    scale = _part(flat, layer, "input_scale")
    _check_scale(key(layer, "input_scale"), scale)
    zero = flat.get(key(layer, "input_zero_point"), torch.zeros(1, dtype=torch.int32))
    for part, tensor in zip(INPUT_PARTS, (scale, zero), strict=True):
        if math.prod(tensor.shape) != 1:
            raise InvalidArgument(f"tensor {key(layer, part)!r}: one value, not the shape {tuple(tensor.shape)}")
    name = key(layer, "input_zero_point")
    if zero.dtype.is_floating_point or zero.dtype == torch.bool:
        raise InvalidArgument(f"tensor {name!r}: a zero point is an integer, not {zero.dtype}")
    if not zero.is_meta and abs(int(zero)) > _MOST_ZERO:
        raise InvalidArgument(f"tensor {name!r}: {int(zero)} is beyond ±{_MOST_ZERO}")
