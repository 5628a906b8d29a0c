"""Export of weight-only policies as a GGUF file for llama.cpp, and as a tensor-type file for its llama-quantize."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..core import FLOAT_BITS, LayerGraph
from ..core.library import libraries
from ..errors import HubMPQError
from ..nn.packing import packed_tensors
from ..pack import Manifest
from .float_copy import float_copy_shapes
from .gguf_types import padded, types_of
from .gguf_write import Entry, begin, entries_of, unwritten, write_gguf

FILE = "model.gguf"
TENSOR_TYPES = "tensor-types.txt"


def export_gguf(
    folder: str | os.PathLike[str], model: nn.Module, manifest: Manifest, config: Mapping[str, Any], example: Any = None
) -> int:
    """Write model.gguf and tensor-types.txt; returns the size of the former in bytes.

    Weights on the grids of Q4_0, Q5_0 and Q8_0 are written exactly. Q4_1 and Q5_1 have a minimum instead of a zero
    point: minus zero point times scale, rounded to float16. All other matrices are F16, vectors F32. Layers whose type
    is a K-quant are F16 too, on their quantized grid, until llama-quantize applies tensor-types.txt; a warning gives
    the command and the size of the resulting file. For models that `unwritten` describes, only the tensor-type file is
    written, and its size is returned.

    Raises:
        HubMPQError: The package gguf is not installed, the policy has a grid that `target="gguf"` does not offer, or
            GGUF does not support the architecture.
    """
    _gguf()
    bits = {name: level for name, level in manifest.policy.bits.items() if level.weight != FLOAT_BITS}
    _check(manifest)
    folder = Path(folder)
    wanted = {x.name: types_of(x)[bits[x.name].of_weight].name for x in manifest.graph if x.name in bits}
    folder.mkdir(parents=True, exist_ok=True)
    if what := unwritten(model.config):
        state = float_copy_shapes(model, libraries.get(manifest.library))
        text = _tensor_types(entries_of(model, manifest.graph, wanted, state))
        (folder / TENSOR_TYPES).write_text(text, encoding="utf-8")
        warnings.warn(
            f"hub_mpq cannot write {what} as GGUF; convert it to F16 with llama.cpp's convert_hf_to_gguf.py, then run "
            f"llama-quantize --tensor-type-file {TENSOR_TYPES} F16.gguf OUT.gguf Q8_0",
            stacklevel=2,
        )
        return len(text)
    entries = write_gguf(folder / FILE, model, manifest.graph, wanted, packed_tensors(model, manifest))
    (folder / TENSOR_TYPES).write_text(_tensor_types(entries), encoding="utf-8")
    size = (folder / FILE).stat().st_size
    if later := [entry for entry in entries if entry.type != entry.wanted]:
        final = size + sum(padded(e.nbytes(e.wanted)) - padded(e.nbytes(e.type)) for e in later)
        warnings.warn(
            f"{len(later)} layers are K-quants, which {FILE} stores as F16; run llama-quantize --tensor-type-file "
            f"{TENSOR_TYPES} {FILE} OUT.gguf Q8_0 to get the final file of {final:,} bytes",
            stacklevel=2,
        )
    return size


def beside_nbytes(model: nn.Module, graph: LayerGraph) -> int | None:
    """Size of a file without the data of the quantized layers: header, names, tokenizer, and float tensors.

    Args:
        model: The network, float or quantized; it may have no weights.
        graph: Its layers.

    Returns:
        Size in bytes; None for a model that cannot be written completely.

    Raises:
        HubMPQError: As `write_gguf`, or the package gguf is not installed.
    """
    _gguf()
    config = getattr(model, "config", None)
    if not hasattr(config, "model_type") or unwritten(config):
        return None
    state = float_copy_shapes(model, libraries.get(graph.library))
    wanted = {layer.name: "Q8_0" for layer in graph if types_of(layer)}
    entries = entries_of(model, graph, wanted, state)
    with tempfile.TemporaryDirectory() as hidden:
        file = Path(hidden) / FILE
        begin(file, model, entries).close()
        head = padded(file.stat().st_size)
    return head + sum(padded(e.nbytes(e.type)) for e in entries if e.layer is None)


def _gguf() -> None:
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise HubMPQError('GGUF requires an extra package; pip install "hub-mpq[gguf]"') from error


def _check(manifest: Manifest) -> None:
    if not libraries.get(manifest.library).pretrained_models:
        raise HubMPQError(f"gguf requires transformers models, got a model of {manifest.library}")
    bits = manifest.policy.bits
    if inputs := [name for name, level in bits.items() if level.activation != FLOAT_BITS]:
        raise HubMPQError(
            f"gguf supports only weights, but the policy quantizes the input of {inputs[0]!r}; load the float model "
            'with target="gguf"'
        )
    for layer in manifest.graph:
        level, menu = bits[layer.name], tuple(types_of(layer))
        if level.weight != FLOAT_BITS and level not in menu:
            raise HubMPQError(
                f"GGUF has no type for layer {layer.name!r} at {level}, only for "
                f"{', '.join(str(b).partition('A')[0] for b in menu) or 'float'}; load the float model with "
                'target="gguf"'
            )


def _tensor_types(entries: list[Entry]) -> str:
    """The lines of a tensor-type file: a regular expression of the name, and the type."""
    matrices = [entry for entry in entries if len(entry.shape) > 1]
    return "".join("^" + e.name.replace(".", r"\.") + f"$={e.wanted.lower()}\n" for e in matrices)
