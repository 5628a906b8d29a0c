"""A policy of linear layers in the format of compressed-tensors, for plain transformers with that package, and vLLM."""

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
    """Whether this format can say the policy."""
    try:
        check_exportable(manifest)
    except HubMPQError:
        return False
    return True


def check_exportable(manifest: Manifest) -> None:
    """Raise HubMPQError, naming layers and the way out, for a policy that this format can't say."""
    graph, bits = manifest.graph, manifest.policy.bits
    if COMPRESSED_TENSORS not in libraries.get(manifest.library).formats:
        readers = " and ".join(library.name for library in libraries if COMPRESSED_TENSORS in library.formats)
        raise HubMPQError(f"{COMPRESSED_TENSORS} is a format of {readers} models; this one is of {manifest.library}")
    other = [x.name for x in graph if x.kind not in _KINDS and bits[x.name].weight != FLOAT_BITS]
    if other:
        kinds = ", ".join(sorted({graph[name].kind for name in other}))
        raise HubMPQError(
            f"{COMPRESSED_TENSORS} packs Linear and Embedding layers; {len(other)} layers are {kinds} "
            f"({_some(other)}); leave them float with exclude=[{other[0]!r}, …], or publish the packed file"
        )
    short = [x.name for x in graph if x.kind == "linear" and x.weight_shape[1] % (bits[x.name].group_size or 1)]
    if short:
        raise HubMPQError(
            f"{COMPRESSED_TENSORS} has no short last group; groups of {bits[short[0]].group_size} do not fill "
            f"the {graph[short[0]].weight_shape[1]} columns of {len(short)} layers ({_some(short)}): take a group_size "
            "that divides them"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def export_compressed(
    folder: str | os.PathLike[str], model: nn.Module, manifest: Manifest, config: Mapping[str, Any], example: Any = None
) -> int:
    """Write config.json and model.safetensors; returns the bytes of the latter.

    One config group per width, group size and symmetry. The words of the packed file serve as they are; 1-bit weights
    are stored at 2 bits, with a warning, since 1 bit here would mean {−1, 0}. Scales are float32, so that a float32
    model computes the same to the bit; transformers rounds them to the dtype of another model.

    Inputs have one static scale and zero point for each layer. Their codes are signed here: 0 … 2^b−1 become −2^(b−1) …
    2^(b−1)−1, and the zero point moves along, so that the grid is the same; where it becomes 0 the scheme is symmetric.
    compressed-tensors adds it before it rounds, so a value that lies between two codes to the last bit may take the
    other one. Where vLLM has kernels for the inputs (`in_int8`) weights are int8, `int-quantized`; all else is
    `pack-quantized`.

    Embeddings, and heads tied to them, are written dequantized: transformers 5.23 fails on a packed one (it initialises
    `embedding.weight`, which is not there). Its `dequantize=True` would load one, but takes the first group's width for
    all layers, leaves inputs float, and gives wrong weights without a word.

    Zero points of b bits are packed along the rows: [ceil(rows·b/32), groups] words, as compressed-tensors writes and
    vLLM reads them. compressed-tensors 0.20 itself makes room for [rows, groups] when transformers loads a model and
    refuses these (0.19 reads them); both read them where zeros fill that shape. So they are written, unless the policy
    was made for target="vllm".

    Warns where vLLM could not load the policy. Raises HubMPQError as check_exportable, and for a model whose class
    can't load it.
    """
    from safetensors.torch import save

    check_exportable(manifest)
    for_vllm = manifest.provenance.get("target") == "vllm"
    if unequal := unequal_inputs(manifest):
        warnings.warn(
            f"layers that read one input have weights of different widths or groups ({_some(unequal[0])}); "
            'transformers loads that, vLLM does not: load the float model with target="vllm" for it',
            stacklevel=2,
        )
    if why := unread_inputs(manifest):
        warnings.warn(f"transformers loads the quantized inputs, vLLM does not: {why}", stacklevel=2)
    library = libraries.get(manifest.library)
    state = float_copy_state(model, library)
    groups: dict[str, dict[str, Any]] = {}
    tensors, int8, stored = packed_tensors(model, manifest), in_int8(manifest), stored_bits(manifest)
    shared = {layer.weight_owner for layer in manifest.graph}
    if int8 and len(unlike := _unlike_scales(manifest, tensors)) > 1:
        warnings.warn(
            f"layers that read one input have scales of their own for it ({_some(unlike)}); transformers takes these, "
            "vLLM the largest",
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
        warnings.warn(f"zero points are stored as {told[0]} reads them; {told[1]} does not", stacklevel=2)
    packed_as = {n: (manifest.policy.bits[n].weight, bits.weight) for n, bits in stored.items()}
    if widened := [name for name, (was, now) in packed_as.items() if (was, now) == (1, 2)]:
        warnings.warn(f"1-bit weights take 2 bits in {COMPRESSED_TENSORS} ({_some(widened)})", stacklevel=2)
    if widened := [name for name, (was, now) in packed_as.items() if was < now == 8]:
        warnings.warn(f"weights of layers with 8-bit inputs take 8 bits, for vLLM ({_some(widened)})", stacklevel=2)
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
    """Raise HubMPQError if transformers reads, while it loads the model's class, a weight that is packed.

    It calls `_init_weights` for every module. That of T5's attention reads the weights of the layers inside.
    """
    with torch.device("meta"):
        skeleton = type(model)(copy.deepcopy(model.config))
    for module in skeleton.modules():
        vars(module).pop("_is_hf_initialized", None)  # as it is before weights are loaded
    for name in names:
        del skeleton.get_submodule(name).weight
    try:
        skeleton.initialize_weights()
    except AttributeError as error:
        if "has no attribute 'weight'" in str(error):
            raise HubMPQError(
                f"transformers can't load {type(model).__name__} in {COMPRESSED_TENSORS}: to initialise it, it reads "
                "weights that are packed; publish the packed file"
            ) from error
    except Exception:  # the meta device's fault: nothing is known
        return


def _scales(packed: PackedTensor) -> Tensor:
    """float32 [rows, groups of a row]."""
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
    """Scale and zero point of an input, as of signed codes; a zero point of 0 is left out."""
    scale = tensors[key(layer, "input_scale")].float().reshape(1)
    zero = int(tensors.get(key(layer, "input_zero_point"), 0)) - 2 ** (bits - 1)
    if not -128 <= zero <= 127:
        raise HubMPQError(
            f"{COMPRESSED_TENSORS} has zero points of 8 bits, and the range of the input of layer {layer!r} lies far "
            "from zero; publish the packed file"
        )
    return {"input_scale": scale} | ({"input_zero_point": torch.tensor([zero], dtype=torch.int8)} if zero else {})


def _packed_columns(zeros: Tensor, num_bits: int) -> Tensor:
    """Zero points [rows, groups] as words [ceil(rows*b/32), groups]."""
    return pack_bits(zeros.t(), num_bits, offset=1 << (num_bits - 1)).t().contiguous()


def _unlike_scales(manifest: Manifest, tensors: Mapping[str, Any]) -> list[str]:
    """Layers that read one input, of the first group of these that quantizes it by several scales."""
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
    """A config group without its layers, and its name."""
    asymmetric = "input_zero_point" in inputs
    return {
        "name": f"group_{str(bits).removesuffix(f'A{FLOAT_BITS}')}{'_asymmetric' if asymmetric else ''}",
        "weights": None if bits.weight == FLOAT_BITS else scheme_of(bits),
        "input_activations": input_scheme_of(bits, not asymmetric),
        "output_activations": None,
        "format": _DENSE if bits.weight == FLOAT_BITS else _INT8 if int8 else _PACKED,
    }


def scheme_of(bits: LayerBits) -> dict[str, Any]:
    """The arguments of compressed-tensors' QuantizationArgs for a weight."""
    group = {"strategy": "channel"} if bits.group_size is None else {"strategy": "group", "group_size": bits.group_size}
    return {"type": "int", "num_bits": bits.weight, "symmetric": bits.symmetric, "dynamic": False, **group}


def input_scheme_of(bits: LayerBits, symmetric: bool) -> dict[str, Any] | None:
    """The same for an input; None where it stays float."""
    if bits.activation == FLOAT_BITS:
        return None
    form = {"type": "int", "num_bits": bits.activation, "symmetric": symmetric, "dynamic": False}
    return {**form, "strategy": "tensor"}
