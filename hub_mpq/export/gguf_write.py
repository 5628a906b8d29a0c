"""Write the tensors of a transformers model as a GGUF file."""

from __future__ import annotations

import math
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core import LayerGraph
from ..core.library import libraries
from ..errors import HubMPQError
from ..pack import PackedTensor
from ..pack.layout import key
from .float_copy import float_copy_state
from .gguf_tokenizer import add_tokenizer
from .gguf_types import GROUP, TYPES

if TYPE_CHECKING:
    from gguf import GGUFWriter

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""{model_type of transformers: architecture in GGUF}, of models that can be written completely."""
NAMES = {
    "falcon": "falcon",
    "gpt_neox": "gptneox",
    "phi": "phi2",
    "cohere": "command-r",
    "mixtral": "llama",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "gemma3_text": "gemma3",
    "granitemoe": "granitemoe",
    "deepseek_v3": "deepseek2",
    "gpt_oss": "gpt-oss",
}
"""Architectures with another name in GGUF than in transformers, for which only tensor-type files are written."""
_FILE_TYPES = {"F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 12}
_FILE_TYPES |= {"Q4_K": 15, "Q5_K": 17, "Q6_K": 18}


_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class Entry:
    """A tensor of a file.

    Args:
        name: Name in the GGUF file.
        source: Name in transformers' files.
        shape: Shape, rows first.
        type: Type that is written.
        wanted: Type that the policy selects; another one if llama-quantize has to make it.
        layer: Name of the quantized layer, or None.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    type: str
    wanted: str
    layer: str | None = None

    def nbytes(self, type: str) -> int:
        """Size of its data in bytes at a type."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        block, size = GGML_QUANT_SIZES[GGMLQuantizationType[type]]
        return math.prod(self.shape) // block * size


def unwritten(config: Any) -> str | None:
    """Description, for messages, of a model that cannot be written completely; None if it can."""
    if config.model_type not in ARCHITECTURES:
        return f"a {config.model_type} model"
    kind = _rope(config).get("rope_type", "default")
    if kind not in ("default", "linear"):
        return f"a {config.model_type} model with rotary embeddings of type {kind!r}"
    if config.hidden_act not in ("silu", "swish"):  # the only one that llama.cpp supports in these architectures
        return f"a {config.model_type} model with activation {config.hidden_act!r}"
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        return f"a {config.model_type} model with a sliding window of {window} tokens"
    return None


def _rope(config: Any) -> dict[str, Any]:
    return dict(getattr(config, "rope_parameters", None) or {})


def write_gguf(
    file: str | os.PathLike[str],
    model: nn.Module,
    graph: LayerGraph,
    wanted: Mapping[str, str] | None = None,
    packed: Mapping[str, Any] | None = None,
) -> list[Entry]:
    """Write a model atomically; `unwritten` must return None for it.

    Args:
        file: File to write.
        model: The network, float or quantized, of one of `ARCHITECTURES`.
        graph: Its layers.
        wanted: {layer: type}; other matrices are F16.
        packed: {layer: its packed weight}, for the types that hub_mpq writes.

    Returns:
        The tensors that were written.

    Raises:
        HubMPQError: A tensor, or the rotary embeddings, cannot be represented in GGUF.
    """
    file, packed = Path(file), packed or {}
    state = float_copy_state(model, libraries.get(graph.library))
    entries = entries_of(model, graph, wanted or {}, state)
    with tempfile.TemporaryDirectory(dir=file.parent) as hidden:
        new = Path(hidden) / file.name
        writer = begin(new, model, entries)
        for entry in entries:
            writer.write_tensor_data(_data(entry, state[entry.source], packed.get(entry.layer or ""), model))
        writer.close()
        os.replace(new, file)
    return entries


def entries_of(
    model: nn.Module, graph: LayerGraph, wanted: Mapping[str, str], state: Mapping[str, Tensor]
) -> list[Entry]:
    """All tensors of a file, sorted by name; for a model that cannot be written completely, those with a name in GGUF.

    Raises:
        HubMPQError: GGUF does not support the architecture, or has no name for a tensor.
    """
    import gguf

    kind = model.config.model_type
    name = ARCHITECTURES.get(kind) or NAMES.get(kind, kind)
    arch = next((arch for arch, text in gguf.MODEL_ARCH_NAMES.items() if text == name), None)
    if arch is None:
        raise HubMPQError(f"GGUF does not support models of type {kind}")
    names = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    library, exact = libraries.get(graph.library), {one.name for one in TYPES if one.exact}
    layers = {}
    for layer in graph:
        if layer.weight_owner is None and layer.name in wanted:
            (disk,) = library.names_on_disk(model, {key(layer.name, "weight"): torch.empty(0)})
            layers[disk] = layer.name
    entries: list[Entry] = []
    for source, tensor in state.items():
        found = names.get_name(source, try_suffixes=(".weight", ".bias"))
        own = layers.get(source)
        if found is None and own is None:  # GGUF stores all experts of a block in one tensor
            found = names.get_name(_EXPERT.sub(".experts.", source), try_suffixes=(".weight", ".bias"))
            if any(entry.name == found for entry in entries):
                continue
        if found is None:
            if own is None and kind not in ARCHITECTURES:
                continue  # such a model is not written completely
            raise HubMPQError(f"GGUF has no name for tensor {source!r} of a {kind} model")
        want = wanted[own] if own is not None else "F16" if tensor.dim() > 1 else "F32"
        written = want if want in exact or want.startswith("F") else "F16"
        entries.append(Entry(found, source, tuple(tensor.shape), written, want, own))
    return sorted(entries, key=lambda entry: entry.name)


def begin(file: Path, model: nn.Module, entries: list[Entry]) -> GGUFWriter:
    """A writer that has written everything except the data."""
    from gguf import GGMLQuantizationType, GGUFWriter

    config = model.config
    if what := unwritten(config):
        raise HubMPQError(f"hub_mpq cannot write {what} as GGUF")
    writer = GGUFWriter(file, ARCHITECTURES[config.model_type])
    _add_metadata(writer, model, entries)
    add_tokenizer(writer, model)
    for entry in entries:
        # with these dtypes, the writer takes shapes in items
        kind = GGMLQuantizationType[entry.type]
        dtype = np.dtype(np.float32 if entry.type == "F32" else np.float16)
        writer.add_tensor_info(entry.name, entry.shape, dtype, entry.nbytes(entry.type), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return writer


def _add_metadata(writer: GGUFWriter, model: nn.Module, entries: list[Entry]) -> None:
    """Add the metadata that llama.cpp needs."""
    c = model.config
    rope = _rope(c)
    head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    writer.add_name(Path(str(model.name_or_path or c.model_type)).name)
    most = max((e.wanted for e in entries if e.layer), key=lambda t: sum(e.wanted == t for e in entries), default="F16")
    writer.add_file_type(_FILE_TYPES[most])
    writer.add_quantization_version(2)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    writer.add_rope_dimension_count(head)
    if rope.get("rope_type") == "linear":
        from gguf import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    writer.add_vocab_size(c.vocab_size)


def _data(entry: Entry, tensor: Tensor, packed: Any, model: nn.Module) -> np.ndarray[Any, Any]:
    """The data of a tensor as it is written."""
    order = _order(entry, model)
    if entry.type in ("F16", "F32"):
        tensor = tensor if order is None else tensor[order]
        return tensor.to(torch.float16 if entry.type == "F16" else torch.float32).contiguous().numpy()
    if not isinstance(packed, PackedTensor):
        raise HubMPQError(f"layer {entry.layer!r} has no packed weight")
    return blocks(packed, order)


def _order(entry: Entry, model: nn.Module) -> Tensor | None:
    """The order of rows in the file: for q and k of a llama, rotary embeddings pair neighbouring rows in llama.cpp, but
    the two halves of a head in transformers."""
    if ARCHITECTURES.get(model.config.model_type) != "llama":
        return None
    part = entry.name.split(".")[-2]
    heads = {"attn_q": model.config.num_attention_heads, "attn_k": model.config.num_key_value_heads}.get(part)
    if heads is None:
        return None
    return torch.arange(entry.shape[0]).view(heads, 2, -1).transpose(1, 2).reshape(-1)


def blocks(packed: PackedTensor, order: Tensor | None = None) -> np.ndarray[Any, Any]:
    """Blocks of 32 weights in the format of Q4_0, Q4_1, Q5_0, Q5_1 or Q8_0.

    Args:
        packed: A weight in groups of 32 at 4, 5 or 8 bits; without zero points at 8 bits.
        order: Order of the rows; None: unchanged.

    Returns:
        uint8 [rows, bytes of a row].
    """
    bits, rows = packed.num_bits, packed.weight_shape[0]
    values, scale, zero = packed.unpack(), packed.weight_scale.to(torch.float16), packed.zero_points()
    if order is not None:
        values, scale, zero = values[order], scale[order], None if zero is None else zero[order]
    parts = [_bytes(scale)]
    if zero is not None:
        low = (-(zero.float() + 2 ** (bits - 1)) * scale.float()).to(torch.float16)
        parts.append(_bytes(low))
    if bits == 8:
        codes = values.numpy().view(np.uint8).reshape(-1, GROUP)
    else:
        whole = (values.to(torch.int16) + 2 ** (bits - 1)).numpy().astype(np.uint8).reshape(-1, GROUP)
        if bits == 5:
            parts.append(np.packbits(whole >> 4, axis=1, bitorder="little"))
        low_bits = whole & 15
        codes = low_bits[:, : GROUP // 2] | (low_bits[:, GROUP // 2 :] << 4)
    return np.concatenate([*parts, codes], axis=1).reshape(rows, -1)


def _bytes(half: Tensor) -> np.ndarray[Any, Any]:
    """float16 numbers as uint8 [numbers, 2]."""
    return half.contiguous().numpy().reshape(-1, 1).view(np.uint8)
