"""Export to the format of compressed-tensors, for transformers with that package and for vLLM."""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core import FLOAT_BITS, LayerBits
from ..core.files import CONFIG
from ..core.library import libraries
from ..errors import HubMPQError
from ..nn.packing import config_of, packed_tensors
from ..pack import Manifest, PackedTensor, pack_weight
from ..pack.atomic import write_atomic
from ..pack.bits import pack_bits
from ..pack.layout import key
from .float_copy import float_copy_state
from .vllm import in_int8, stored_bits, unequal_inputs, unread_inputs

COMPRESSED_TENSORS = "compressed-tensors"
_KINDS = ("linear", "embedding")
_PACKED, _INT8, _DENSE = "pack-quantized", "int-quantized", "dense"


def exportable(manifest: Manifest) -> bool:
    """Whether the format compressed-tensors can represent a policy.

    Args:
        manifest: The manifest of the packed model.

    Returns:
        True if `check_exportable` raises no error.

    Example:
        >>> from hub_mpq import HubMPQ, Policy
        >>> from hub_mpq.export import exportable
        >>> from hub_mpq.pack import Manifest
        >>> graph = HubMPQ.from_pretrained("test_resnet", pretrained=False).graph
        >>> exportable(Manifest("test_resnet", None, "timm", graph, Policy.uniform(graph, "W4A4")))
        False
    """
    try:
        check_exportable(manifest)
    except HubMPQError:
        return False
    return True


def check_exportable(manifest: Manifest) -> None:
    """Check that the format compressed-tensors can represent a policy.

    Args:
        manifest: The manifest of the packed model.

    Raises:
        HubMPQError: It cannot; the message names the layers and an alternative.

    Example:
        >>> from hub_mpq import HubMPQ, Policy
        >>> from hub_mpq.export import check_exportable
        >>> from hub_mpq.pack import Manifest
        >>> graph = HubMPQ.from_pretrained("test_resnet", pretrained=False).graph
        >>> check_exportable(Manifest("test_resnet", None, "timm", graph, Policy.uniform(graph, "W4A4")))
        Traceback (most recent call last):
        ...
        hub_mpq.errors.HubMPQError: compressed-tensors ... transformers models, ...
    """
    graph, bits = manifest.graph, manifest.policy.bits
    if COMPRESSED_TENSORS not in libraries.get(manifest.library).formats:
        readers = " and ".join(library.name for library in libraries if COMPRESSED_TENSORS in library.formats)
        raise HubMPQError(f"{COMPRESSED_TENSORS} requires {readers} models, got a model of {manifest.library}")
    other = [x.name for x in graph if x.kind not in _KINDS and bits[x.name].weight != FLOAT_BITS]
    if other:
        kinds = ", ".join(sorted({graph[name].kind for name in other}))
        raise HubMPQError(
            f"{COMPRESSED_TENSORS} supports only Linear and Embedding layers, but {len(other)} layers are {kinds} "
            f"({_some(other)}); leave them float with exclude=[{other[0]!r}, …], or publish the packed file"
        )
    short = [x.name for x in graph if x.kind == "linear" and x.weight_shape[1] % (bits[x.name].group_size or 1)]
    if short:
        raise HubMPQError(
            f"{COMPRESSED_TENSORS} requires a group_size that divides the columns; {bits[short[0]].group_size} does "
            f"not divide the {graph[short[0]].weight_shape[1]} columns of {len(short)} layers ({_some(short)})"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def export_compressed(
    folder: str | os.PathLike[str], model: nn.Module, manifest: Manifest, config: Mapping[str, Any], example: Any = None
) -> int:
    """Write config.json and model.safetensors; returns the size of the latter in bytes.

    There is one config group per bit-width, group size and symmetry. The words of the packed file are used unchanged,
    except that 1-bit weights are stored at 2 bits, with a warning, because 1 bit would mean {−1, 0} in this format.
    Scales are float32, so that a float32 model computes bit-identical results; for another dtype, transformers rounds
    them.

    Inputs have one static scale and zero point per layer. Their codes are signed in this format: 0 … 2^b−1 become
    −2^(b−1) … 2^(b−1)−1, and the zero point is shifted with them, so that the grid is the same. If it becomes 0, the
    scheme is symmetric. compressed-tensors adds the zero point before rounding, so an exact tie may round to the other
    code. If vLLM has kernels for the inputs (`in_int8`), weights are int8, `int-quantized`; otherwise `pack-quantized`.

    Embeddings, and heads tied to them, are written dequantized, because transformers 5.23 fails on packed ones (it
    initialises `embedding.weight`, which does not exist). Its `dequantize=True` would load them, but uses the first
    group's bit-width for all layers, leaves inputs float, and silently returns wrong weights.

    Zero points of b bits are packed along the rows: [ceil(rows·b/32), groups] words, as compressed-tensors writes and
    vLLM reads them. When transformers loads a model, compressed-tensors 0.20 itself allocates [rows, groups] and
    rejects these (0.19 reads them); both read them if padded to that shape with zeros. So they are padded, unless the
    policy was made for target="vllm".

    Warns if vLLM cannot load the policy.

    Raises:
        HubMPQError: As `check_exportable`, or the model's class cannot load the file.
    """
    from safetensors.torch import save

    check_exportable(manifest)
    for_vllm = manifest.provenance.get("target") == "vllm"
    if unequal := unequal_inputs(manifest):
        warnings.warn(
            f"layers that share an input have weights of different bit-widths or groups ({_some(unequal[0])}), which "
            'transformers can load but vLLM cannot; for vLLM, load the float model with target="vllm"',
            stacklevel=2,
        )
    if why := unread_inputs(manifest):
        warnings.warn(f"transformers can load the quantized inputs, but vLLM cannot: {why}", stacklevel=2)
    library = libraries.get(manifest.library)
    state = float_copy_state(model, library)
    groups: dict[str, dict[str, Any]] = {}
    tensors, int8, stored = packed_tensors(model, manifest), in_int8(manifest), stored_bits(manifest)
    shared = {layer.weight_owner for layer in manifest.graph}
    if int8 and len(unlike := _unlike_scales(manifest, tensors)) > 1:
        warnings.warn(
            f"layers that share an input have different scales for it ({_some(unlike)}); transformers uses each, vLLM "
            "the largest",
            stacklevel=2,
        )
    for layer in manifest.graph:
        packed, bits = tensors.get(layer.name), stored[layer.name]
        parts: dict[str, Tensor] = {}
        if layer.kind == "embedding":
            continue
        (name,) = library.names_on_disk(model, {key(layer.name, "weight"): torch.empty(0)})
        if layer.name in shared or not isinstance(packed, PackedTensor):
            bits = LayerBits(FLOAT_BITS, bits.activation)
        elif int8 and bits.activation != FLOAT_BITS:
            parts |= _int8_parts(packed)
        else:
            parts |= _packed_parts(packed, for_vllm)
        if parts:
            del state[name]
        inputs = {} if bits.activation == FLOAT_BITS else _input_parts(layer.name, tensors, bits.activation)
        state |= {key(name.removesuffix(".weight"), part): tensor for part, tensor in (parts | inputs).items()}
        if parts or inputs:
            scheme = _scheme(bits, "weight" in parts, inputs)
            groups.setdefault(scheme.pop("name"), {"targets": [], **scheme})["targets"].append(layer.name)
    if not all(g["weights"] is None or g["weights"]["symmetric"] for g in groups.values()):
        told = ("vLLM", f"transformers with {COMPRESSED_TENSORS} 0.20") if for_vllm else ("transformers", "vLLM")
        warnings.warn(f"zero points are stored for {told[0]}; {told[1]} cannot read them", stacklevel=2)
    packed_as = {n: (manifest.policy.bits[n].weight, bits.weight) for n, bits in stored.items()}
    if widened := [name for name, (was, now) in packed_as.items() if (was, now) == (1, 2)]:
        warnings.warn(f"1-bit weights are stored at 2 bits in {COMPRESSED_TENSORS} ({_some(widened)})", stacklevel=2)
    if widened := [name for name, (was, now) in packed_as.items() if was < now == 8]:
        warnings.warn(
            f"weights of layers with 8-bit inputs are stored at 8 bits for vLLM ({_some(widened)})", stacklevel=2
        )
    check_loadable(model, [n for g in groups.values() if g["format"] == _PACKED for n in g["targets"]])
    public = {k: v for k, v in config_of(model, config).items() if k not in ("_name_or_path", "quantization_config")}
    public["quantization_config"] = _quantization(groups)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(public, indent=2, sort_keys=True) + "\n"
    size = write_atomic(folder / "model.safetensors", [save(state, metadata={"format": "pt"})])
    write_atomic(folder / CONFIG, [text.encode()])
    return size


def check_loadable(model: Any, names: Iterable[str]) -> None:
    """Raise HubMPQError if transformers reads a packed weight while it loads the model's class.

    It calls `_init_weights` for each module; that of T5's attention, for example, reads the weights of its layers.
    """
    with torch.device("meta"):
        skeleton = type(model)(copy.deepcopy(model.config))
    for module in skeleton.modules():
        vars(module).pop("_is_hf_initialized", None)  # as before weights are loaded
    for name in names:
        del skeleton.get_submodule(name).weight
    try:
        skeleton.initialize_weights()
    except AttributeError as error:
        if "has no attribute 'weight'" in str(error):
            raise HubMPQError(
                f"transformers cannot load {type(model).__name__} in {COMPRESSED_TENSORS}, because its initialisation "
                "reads packed weights; publish the packed file instead"
            ) from error
    except Exception:  # caused by the meta device: inconclusive
        return


def _scales(packed: PackedTensor) -> Tensor:
    """Scales as float32 [rows, groups of a row]."""
    scale = packed.weight_scale.float().view(-1, packed.weight_scale.shape[-1] if packed.group_size else 1)
    return scale.repeat_interleave(packed.weight_shape[0] // len(scale), 0)


def _int8_parts(packed: PackedTensor) -> dict[str, Tensor]:
    return {"weight": packed.unpack(), "weight_scale": _scales(packed)}


def _packed_parts(packed: PackedTensor, for_vllm: bool) -> dict[str, Tensor]:
    if packed.num_bits == 1:
        packed = pack_weight(packed.unpack(), packed.weight_scale, packed.kind, 2, group_size=packed.group_size)
    parts = {"weight_packed": packed.weight_packed, "weight_scale": _scales(packed)}
    parts["weight_shape"] = torch.tensor(packed.weight_shape)
    if not packed.bits.symmetric:
        rows = packed.weight_shape[0]
        zeros = _packed_columns(packed.zero_points().view(rows, -1), packed.num_bits)
        if not for_vllm:
            zeros = torch.nn.functional.pad(zeros, (0, 0, 0, rows - len(zeros)))
        parts["weight_zero_point"] = zeros
    return parts


def _input_parts(layer: str, tensors: Mapping[str, Any], bits: int) -> dict[str, Tensor]:
    """Scale and zero point of an input, for signed codes; a zero point of 0 is omitted."""
    scale = tensors[key(layer, "input_scale")].float().reshape(1)
    zero = int(tensors.get(key(layer, "input_zero_point"), 0)) - 2 ** (bits - 1)
    if not -128 <= zero <= 127:
        raise HubMPQError(
            f"{COMPRESSED_TENSORS} requires zero points of 8 bits, but the input range of layer {layer!r} is too far "
            "from zero; publish the packed file instead"
        )
    return {"input_scale": scale} | ({"input_zero_point": torch.tensor([zero], dtype=torch.int8)} if zero else {})


def _packed_columns(zeros: Tensor, num_bits: int) -> Tensor:
    """Zero points [rows, groups] as words [ceil(rows*b/32), groups]."""
    return pack_bits(zeros.t(), num_bits, offset=1 << (num_bits - 1)).t().contiguous()


def _unlike_scales(manifest: Manifest, tensors: Mapping[str, Any]) -> list[str]:
    """The first group of layers that share an input but have several scales for it."""
    groups: dict[str, dict[float, str]] = {}
    for layer in manifest.graph:
        scale = tensors.get(key(layer.name, "input_scale"))
        if layer.activation_tie is not None and scale is not None:
            groups.setdefault(layer.activation_tie, {}).setdefault(float(scale), layer.name)
    return next((list(names.values()) for names in groups.values() if len(names) > 1), [])


def _quantization(groups: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": COMPRESSED_TENSORS,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "ignore": [],
        "config_groups": {
            name: {**groups[name], "targets": sorted(groups[name]["targets"])} for name in sorted(groups)
        },
    }


def _scheme(bits: LayerBits, int8: bool, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """A config group, with its name but without its layers."""
    asymmetric = "input_zero_point" in inputs
    return {
        "name": f"group_{str(bits).removesuffix(f'A{FLOAT_BITS}')}{'_asymmetric' if asymmetric else ''}",
        "weights": None if bits.weight == FLOAT_BITS else scheme_of(bits),
        "input_activations": input_scheme_of(bits, not asymmetric),
        "output_activations": None,
        "format": _DENSE if bits.weight == FLOAT_BITS else _INT8 if int8 else _PACKED,
    }


def scheme_of(bits: LayerBits) -> dict[str, Any]:
    """Arguments of compressed-tensors' QuantizationArgs for a weight."""
    group = {"strategy": "channel"} if bits.group_size is None else {"strategy": "group", "group_size": bits.group_size}
    return {"type": "int", "num_bits": bits.weight, "symmetric": bits.symmetric, "dynamic": False, **group}


def input_scheme_of(bits: LayerBits, symmetric: bool) -> dict[str, Any] | None:
    """The same for an input; None if it is float."""
    if bits.activation == FLOAT_BITS:
        return None
    form = {"type": "int", "num_bits": bits.activation, "symmetric": symmetric, "dynamic": False}
    return {**form, "strategy": "tensor"}
