"""Convert a quantized model to the tensors of a packed file, and back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core import FLOAT_BITS
from ..core.library import libraries
from ..cost.size import layer_nbytes
from ..errors import HubMPQError, InvalidArgument, PackedFormat
from ..pack import Manifest, PackedTensor, empty_packed, file_nbytes, layout, pack_weight
from ..pack.layout import INPUT_PARTS
from ..pack.layout import key as part_key
from ..quantizers import LSQ, GroupedLSQ
from .expose import layers_in_state
from .packed import packed_layers
from .quantize import check_finite, quantized_layers


def layer_names(model: nn.Module, layers: Iterable[str]) -> dict[str, str]:
    """{name: the layer's first name} for every name of the layers in the model."""
    first = {model.get_submodule(name): name for name in layers}
    return {name: first[m] for name, m in model.named_modules(remove_duplicate=False) if m in first}


def float_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without the quantizers' tensors, which a file stores in its own form."""
    names = layer_names(model, [name for name, _ in quantized_layers(model)])
    mine = tuple(part_key(name, part) for name in names for part in ("weight_quantizer.", "input_quantizer."))
    return {key: tensor for key, tensor in model.state_dict().items() if not key.startswith(mine)}


def _stored_state(model: nn.Module, layers: Iterable[str]) -> dict[str, Tensor]:
    """`float_state` with one name for each layer and each Parameter."""
    others = tuple(part_key(name, "") for name, first in layer_names(model, layers).items() if name != first)
    again = _second_names(model)
    return {k: tensor for k, tensor in float_state(model).items() if not k.startswith(others) and k not in again}


def _second_names(model: nn.Module) -> set[str]:
    """Names of Parameters that already have an earlier name in the model (a head tied to the embedding)."""
    first: dict[int, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    return {name for name, parameter in named if first.setdefault(id(parameter), name) != name}


@torch.no_grad()
def packed_tensors(model: nn.Module, manifest: Manifest) -> dict[str, PackedTensor | Tensor]:
    """The contents of a packed file: integers of the quantized weights, scales, and every other tensor unchanged.

    Raises HubMPQError if the model's layers are not those of the manifest, and InvalidArgument if a quantized weight or
    its bias is not finite.
    """
    check_finite(model, [name for name, _ in quantized_layers(model)])
    graph = manifest.graph
    for name, _ in (*quantized_layers(model), *packed_layers(model)):
        if name not in graph.names:
            raise HubMPQError(
                f"layer {name!r} is not in the policy; if an adapter wraps it, save the adapter with its own "
                "save_pretrained and unload it before saving the model"
            )
    out: dict[str, PackedTensor | Tensor] = {}
    skip: set[str] = set()
    layers: list[str] = []
    for name, module in quantized_layers(model):
        layers.append(name)
        skip.add(part_key(name, "weight"))
        if graph[name].weight_owner is None:
            out[name] = packed_weight(module, graph[name].kind)
        if module.input_quantizer is not None:
            out[part_key(name, "input_scale")] = module.input_quantizer.scale.detach().cpu()
            zero = torch.tensor([module.input_quantizer.zero_point], dtype=torch.int32)
            out[part_key(name, "input_zero_point")] = zero
    for name, module in packed_layers(model):
        layers.append(name)
        if not module.owner:
            out[name] = module.packed
            skip |= {part_key(name, part) for part in module.packed.parts()}
    for key, tensor in _stored_state(model, layers).items():
        if key not in skip:
            out[key] = tensor.detach().cpu()
    return out | _guard(manifest, "cpu")


@torch.no_grad()
def packed_weight(module: Any, kind: str) -> PackedTensor:
    """The weight of a quantized layer as rounded by its quantizer, on the CPU."""
    q, weight = module.weight_quantizer, module.weight
    if not isinstance(q, GroupedLSQ):
        return pack_weight(q.to_int(weight).cpu(), q.scale.detach().cpu(), kind, q.spec.num_bits)
    scale, zero = q.group_scale().cpu(), q.group_zero_points()
    scale = scale.flatten() if q.group_size is None else scale
    zero = None if zero is None else zero.cpu()
    return pack_weight(q.stored(weight).cpu(), scale, kind, q.spec.num_bits, zero, q.group_size)


@torch.no_grad()
def take_weight(model: nn.Module, module: Any, packed: PackedTensor, *, values: bool = True) -> None:
    """Load a packed weight into a quantized layer: its values, scales and zero points.

    Args:
        model: The model of the layer; layers that share the weight's quantizer are updated too.
        module: The layer, whose quantizer has the packed weight's bit-width, groups and zero points.
        packed: The weight.
        values: Load the values too; if False, the layer keeps its float weight.
    """
    if values:
        module.weight.copy_(packed.dequantize())
    q = module.weight_quantizer
    if isinstance(q, GroupedLSQ):
        q.init(packed.num_bits, packed.weight_scale, packed.zero_points())
        return
    if packed.weight_scale.numel() != q.base.shape[1]:  # saved with one scale per tensor
        fresh = LSQ(q.widths, signed=True, channels=packed.weight_scale.numel(), axis=q.axis)
        for _, other in quantized_layers(model):  # a tied head uses its owner's quantizer
            if other.weight_quantizer is q:
                other.weight_quantizer = fresh
        q = fresh
    q.init(packed.num_bits, packed.weight_scale)


def _guard(manifest: Manifest, device: str) -> dict[str, PackedTensor | Tensor]:
    """An empty float weight next to the first packed one of a library's model: loading the packed file as float weights
    (after renaming it, say) then fails with a wrong shape, instead of transformers drawing random weights silently."""
    if not libraries.get(manifest.library).builds_from_folder:
        return {}
    names = list(layout.packed_layers(manifest))[:1]
    return {part_key(name, "weight"): torch.empty(0, device=device) for name in names}


def predicted_nbytes(model: nn.Module, manifest: Manifest) -> int:
    """Exact size in bytes of a model's packed file at the manifest's policy, before anything is packed."""
    graph, bits = manifest.graph, manifest.policy.bits
    out: dict[str, PackedTensor | Tensor] = {}
    skip = set()
    for layer in graph:
        level = bits[layer.name]
        if level.weight != FLOAT_BITS:
            skip |= {f"{layer.name}.weight", layer.name}  # a stack of experts is named like its Parameter
            if layer.weight_owner is None:
                out[layer.name] = empty_packed(layer.kind, layer.weight_shape, level)
        if level.activation != FLOAT_BITS:
            out[f"{layer.name}.input_scale"] = torch.empty(1, device="meta")
            out[f"{layer.name}.input_zero_point"] = torch.empty(1, dtype=torch.int32, device="meta")
    for name, module in packed_layers(model):
        skip |= {part_key(name, part) for part in module.packed.parts()}
    quantized = [n for n in graph.names if bits[n].weight != FLOAT_BITS]
    for key, tensor in layers_in_state(model, _stored_state(model, quantized), quantized).items():
        if key not in skip:
            out[key] = torch.empty_like(tensor, device="meta")
    return file_nbytes(out | _guard(manifest, "meta"), manifest)


def base_nbytes(model: nn.Module, manifest: Manifest) -> int:
    """Bytes of a float model's packed file without its searched layers, the same for every policy."""
    bits = manifest.policy.bits
    return predicted_nbytes(model, manifest) - sum(layer_nbytes(x, bits[x.name]) for x in manifest.graph.searched)


def config_of(model: nn.Module, config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with its dtype, if it has one, set to the dtype that the model's quantized layers compute in."""
    found = [module.weight.dtype for _, module in quantized_layers(model)]
    found += [module.compute.dtype for _, module in packed_layers(model)]
    told = {"dtype": str(found[0]).removeprefix("torch.")} if found and config.get("dtype") else {}
    return {**config, **told}


def _take_dtypes(model: nn.Module, tensors: Mapping[str, PackedTensor | Tensor]) -> None:
    """Cast a model's tensors to the dtypes of the file. Quantized weights have no stored dtype and get that of their
    bias, else the most common dtype of the file."""
    dtypes = {
        key: tensor.dtype
        for key, tensor in tensors.items()
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and not key.endswith("input_scale")
    }
    for key, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and key in dtypes:
            tensor.data = tensor.data.to(dtypes[key])
    for name, module in quantized_layers(model):
        known = dtypes.get(part_key(name, "bias"), _common_dtype(tensors))
        module.weight.data = module.weight.data.to(known or module.weight.dtype)


def check_tensors(
    path: object, model: nn.Module, tensors: Mapping[str, PackedTensor | Tensor], *, cast: bool = False
) -> None:
    """Check that tensors determine every Parameter and buffer of a quantized model.

    Args:
        path: The packed file, for error messages.
        model: The model; it may be on the meta device.
        tensors: The contents of the file; they may be on the meta device.
        cast: Whether the model's tensors keep their dtypes instead of taking those of the file.

    Raises:
        PackedFormat: A tensor is missing, unknown, or of another shape or dtype.
    """
    shapes = {name: tuple(t.shape) for name, t in tensors.items() if isinstance(t, Tensor)}
    packed = {name for name, t in tensors.items() if isinstance(t, PackedTensor)}
    for name, module in quantized_layers(model):
        packed.discard(name)
        shapes[part_key(name, "weight")] = tuple(module.weight.shape)
        if module.input_quantizer is not None:
            for part in INPUT_PARTS:
                shapes.pop(part_key(name, part), None)
    own = _stored_state(model, [name for name, _ in quantized_layers(model)])
    for name in _second_names(model) - set(own):  # files from before 2026-11-28 have them
        shapes.pop(name, None)
    missing, extra = set(own) - set(shapes), (set(shapes) | packed) - set(own)
    if missing or extra:
        raise PackedFormat(path, f"missing tensors {sorted(missing)[:4]}, unknown tensors {sorted(extra)[:4]}")
    for key, tensor in own.items():
        if tuple(tensor.shape) != shapes[key]:
            raise PackedFormat(path, f"tensor {key!r}: expected shape {tuple(tensor.shape)}, got {shapes[key]}")
    if not cast:
        _check_dtypes(path, model, own, tensors)


_COMPUTES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def _check_dtypes(
    path: object, model: nn.Module, own: Mapping[str, Tensor], tensors: Mapping[str, PackedTensor | Tensor]
) -> None:
    """Raise PackedFormat for dtypes that the model cannot compute in: integers where it has floats, quantized layers
    of several dtypes where it has one, other tensors of a third dtype."""
    found = {key: t.dtype for key in own if isinstance(t := tensors.get(key), Tensor)}
    biases = [key for name, _ in quantized_layers(model) if (key := part_key(name, "bias")) in found]
    of_layers: dict[torch.dtype, torch.dtype] = {}
    for key in biases:
        of_layers.setdefault(own[key].dtype, found[key])
    common = _common_dtype(tensors)
    for key, dtype in found.items():
        here = own[key].dtype
        allowed = {here}
        if key in biases:
            allowed = {of_layers[here]} & set(_COMPUTES)
        elif here in _COMPUTES:
            allowed |= {torch.float32, common, *of_layers.values()} & set(_COMPUTES)
        if dtype not in allowed:
            raise PackedFormat(path, f"tensor {key!r}: {dtype} does not fit the network's {here}")


def _common_dtype(tensors: Mapping[str, PackedTensor | Tensor]) -> torch.dtype | None:
    """The most common dtype of the floating-point tensors."""
    dtypes = (
        t.dtype
        for key, t in tensors.items()
        if isinstance(t, Tensor) and t.is_floating_point() and not key.endswith("input_scale")
    )
    return next((dtype for dtype, _ in Counter(dtypes).most_common(1)), None)


@torch.no_grad()
def load_quantized(
    path: object, model: nn.Module, tensors: Mapping[str, PackedTensor | Tensor], *, cast: bool = False
) -> None:
    """Load packed tensors into a quantized model: weights on their grids, scales, everything else.

    Args:
        path: The packed file, for error messages.
        model: The model.
        tensors: The contents of the file.
        cast: Whether the model's tensors keep their dtypes instead of taking those of the file.

    Raises:
        PackedFormat: The tensors do not match the model, or a weight is not finite.
    """
    check_tensors(path, model, tensors, cast=cast)
    if not cast:
        _take_dtypes(model, tensors)
    rest: dict[str, Any] = dict(tensors)
    for name, module in quantized_layers(model):
        packed = rest.get(name)
        if isinstance(packed, PackedTensor):
            take_weight(model, module, rest.pop(name))
        rest[part_key(name, "weight")] = module.weight
        if module.input_quantizer is not None:
            scale = rest.pop(part_key(name, "input_scale"))
            zero = rest.pop(part_key(name, "input_zero_point"), torch.zeros(1))
            module.input_quantizer.init(module.input_quantizer.widths[0], scale.reshape(1), int(zero))
    for name in _second_names(model):
        rest.pop(name, None)
    model.load_state_dict(rest, strict=False)
    try:
        check_finite(model, [name for name, _ in quantized_layers(model)])
    except InvalidArgument as error:
        raise PackedFormat(path, str(error)) from None
