"""A weight-only policy as a GGUF file for llama.cpp, and as a tensor-type file for its llama-quantize."""

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
    """Write model.gguf and tensor-types.txt; returns the bytes of the former.

    Weights on the grids of Q4_0, Q5_0 and Q8_0 are written as they are, and read back equal to the bit. Q4_1 and Q5_1
    hold a minimum in place of a zero point: minus zero point times scale, rounded to float16. Everything else that is a
    matrix is F16, vectors F32. Layers whose type is a K-quant are F16 too, on their quantized grid, until
    llama-quantize has read tensor-types.txt; a warning gives the command and the bytes of its file. Of a model that
    `unwritten` names the tensor-type file alone is written, and its bytes are returned.

    Raises:
        HubMPQError: The package gguf is not installed, the policy has another grid than `target="gguf"` offers, or GGUF
            has no names for the architecture.
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
            f"{what} is not written as GGUF here: make its F16 file with llama.cpp's "
            f"convert_hf_to_gguf.py, then llama-quantize --tensor-type-file {TENSOR_TYPES} F16.gguf OUT.gguf Q8_0",
            stacklevel=2,
        )
        return len(text)
    entries = write_gguf(folder / FILE, model, manifest.graph, wanted, packed_tensors(model, manifest))
    (folder / TENSOR_TYPES).write_text(_tensor_types(entries), encoding="utf-8")
    size = (folder / FILE).stat().st_size
    if later := [entry for entry in entries if entry.type != entry.wanted]:
        final = size + sum(padded(e.nbytes(e.wanted)) - padded(e.nbytes(e.type)) for e in later)
        warnings.warn(
            f"{len(later)} layers are K-quants and stand in {FILE} as F16: llama-quantize --tensor-type-file "
            f"{TENSOR_TYPES} {FILE} OUT.gguf Q8_0 makes the file of {final:,} bytes",
            stacklevel=2,
        )
    return size


def beside_nbytes(model: nn.Module, graph: LayerGraph) -> int | None:
    """Bytes of a file beside the data of the quantized layers: the header with names and tokenizer, and float tensors.

    Args:
        model: The network, float or quantized, its weights need not be there.
        graph: Its layers.

    Returns:
        The bytes; None for a model that is not written whole.

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
        raise HubMPQError('GGUF needs another package: pip install "hub-mpq[gguf]"') from error


def _check(manifest: Manifest) -> None:
    if not libraries.get(manifest.library).pretrained_models:
        raise HubMPQError(f"gguf is a format of transformers' models; this one is of {manifest.library}")
    bits = manifest.policy.bits
    if inputs := [name for name, level in bits.items() if level.activation != FLOAT_BITS]:
        raise HubMPQError(
            f"gguf holds weights alone; the policy quantizes the input of {inputs[0]!r}: load the float model with "
            'target="gguf"'
        )
    for layer in manifest.graph:
        level, menu = bits[layer.name], tuple(types_of(layer))
        if level.weight != FLOAT_BITS and level not in menu:
            raise HubMPQError(
                f"no GGUF type holds layer {layer.name!r} at {level}; it could be one of: "
                f"{', '.join(str(b).partition('A')[0] for b in menu) or 'none'}; load the float model with "
                'target="gguf"'
            )


def _tensor_types(entries: list[Entry]) -> str:
    """The lines of a tensor-type file: a regular expression for the name, and the type."""
    matrices = [entry for entry in entries if len(entry.shape) > 1]
    return "".join("^" + e.name.replace(".", r"\.") + f"$={e.wanted.lower()}\n" for e in matrices)
