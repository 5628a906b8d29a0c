"""A weight-only policy as compressed-tensors' pack-quantized, for plain transformers with that package, and vLLM."""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
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

COMPRESSED_TENSORS = "compressed-tensors"
_KINDS = ("linear", "embedding")


def exportable(manifest: Manifest) -> bool:
    """Whether this format can say the policy."""
    try:
        check_exportable(manifest)
    except HubMPQError:
        return False
    return True


def unequal_inputs(manifest: Manifest) -> list[list[str]]:
    """Groups of layers that read one input (q, k, v; gate, up) and whose weights are stored in different forms.

    transformers computes them apart; vLLM as one matrix, and so reads a policy only where there is no such group.
    """
    groups: dict[str, list[str]] = {}
    for layer in manifest.graph:
        if layer.activation_tie is not None:
            groups.setdefault(layer.activation_tie, []).append(layer.name)
    bits = manifest.policy.bits
    return [names for names in groups.values() if len({stored_bits(bits[name]) for name in names}) > 1]


def stored_bits(bits: LayerBits) -> LayerBits:
    """What a weight is stored as: at least 2 bits."""
    return replace(bits.of_weight, weight=max(bits.weight, 2))


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
    inputs = [name for name, level in bits.items() if level.activation != FLOAT_BITS]
    if inputs:
        raise HubMPQError(
            f"{COMPRESSED_TENSORS} is exported weight-only; the policy quantizes the inputs of {len(inputs)} layers "
            f"({_some(inputs)}); load the float model with weight_only=True, or publish the packed file"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def export_compressed(
    folder: str | os.PathLike[str], model: nn.Module, manifest: Manifest, config: Mapping[str, Any], example: Any = None
) -> int:
    """Write config.json and model.safetensors; returns the bytes of the latter.

    One config group per width, group size and symmetry. The words of the packed file serve as they are; 1-bit weights
    are stored at 2 bits, with a warning, since 1 bit here would mean {−1, 0}. Scales are float32, so that a float32
    model computes the same to the bit; transformers rounds them to the dtype of another model. Embeddings, and heads
    tied to them, are written dequantized: transformers 5.23 fails on a packed one (it initialises `embedding.weight`,
    which is not there). Its `dequantize=True` would load one, but takes the first group's width for all layers and
    gives wrong weights without a word.

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
    library = libraries.get(manifest.library)
    state = float_copy_state(model, library)
    groups: dict[LayerBits, list[str]] = {}
    tensors = packed_tensors(model, manifest)
    shared = {layer.weight_owner for layer in manifest.graph}
    for layer in manifest.graph:
        packed = tensors.get(layer.name)
        if layer.kind == "embedding" or layer.name in shared or not isinstance(packed, PackedTensor):
            continue
        words = _two_bits(packed) if packed.num_bits == 1 else packed
        (name,) = library.names_on_disk(model, {key(layer.name, "weight"): torch.empty(0)})
        module = name.removesuffix(".weight")
        del state[name]
        scale = words.weight_scale.float().view(-1, words.weight_scale.shape[-1] if words.group_size else 1)
        state[key(module, "weight_packed")] = words.weight_packed
        state[key(module, "weight_scale")] = scale.repeat_interleave(layer.weight_shape[0] // len(scale), 0)
        state[key(module, "weight_shape")] = torch.tensor(layer.weight_shape)
        if not words.bits.symmetric:
            zeros = _packed_columns(words.zero_points().view(scale.shape), words.num_bits)
            if not for_vllm:
                zeros = torch.nn.functional.pad(zeros, (0, 0, 0, len(scale) - len(zeros)))
            state[key(module, "weight_zero_point")] = zeros
        groups.setdefault(words.bits, []).append(layer.name)
    if not all(bits.symmetric for bits in groups):
        told = ("vLLM", f"transformers with {COMPRESSED_TENSORS} 0.20") if for_vllm else ("transformers", "vLLM")
        warnings.warn(f"zero points are stored as {told[0]} reads them; {told[1]} does not", stacklevel=2)
    if widened := [x.name for x in manifest.graph if manifest.policy.bits[x.name].weight == 1]:
        warnings.warn(f"1-bit weights take 2 bits in {COMPRESSED_TENSORS} ({_some(widened)})", stacklevel=2)
    check_loadable(model, [name for names in groups.values() for name in names])
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


def _two_bits(packed: PackedTensor) -> PackedTensor:
    return pack_weight(packed.unpack(), packed.weight_scale, packed.kind, 2, group_size=packed.group_size)


def _packed_columns(zeros: Tensor, num_bits: int) -> Tensor:
    """Zero points [rows, groups] as words [ceil(rows*b/32), groups]."""
    return pack_bits(zeros.t(), num_bits, offset=1 << (num_bits - 1)).t().contiguous()


def _quantization(groups: Mapping[LayerBits, list[str]]) -> dict[str, Any]:
    return {
        "quant_method": COMPRESSED_TENSORS,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": [],
        "config_groups": {
            f"group_{str(bits).removesuffix(f'A{FLOAT_BITS}')}": {
                "targets": sorted(names),
                "weights": scheme_of(bits),
                "input_activations": None,
                "output_activations": None,
                "format": "pack-quantized",
            }
            for bits, names in sorted(groups.items())
        },
    }


def scheme_of(bits: LayerBits) -> dict[str, Any]:
    """The arguments of compressed-tensors' QuantizationArgs for a weight."""
    group = {"strategy": "channel"} if bits.group_size is None else {"strategy": "group", "group_size": bits.group_size}
    return {"type": "int", "num_bits": bits.weight, "symmetric": bits.symmetric, "dynamic": False, **group}
