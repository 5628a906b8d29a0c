"""Other programs' formats. The packed file stays the default; these are written from it on demand."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Protocol

from torch import nn

from ..errors import InvalidArgument
from ..pack import Manifest
from ..pack.atomic_folder import atomic_folder
from .compressed_tensors import COMPRESSED_TENSORS, check_exportable, export_compressed, exportable
from .gguf import export_gguf
from .onnx import export_onnx
from .recipe import llm_compressor_recipe
from .vllm import unequal_inputs, unread_inputs

__all__ = [
    "COMPRESSED_TENSORS",
    "FORMATS",
    "check_exportable",
    "export",
    "exportable",
    "llm_compressor_recipe",
    "unequal_inputs",
    "unread_inputs",
]


class Exporter(Protocol):
    """Writes a quantized model into a folder and returns the bytes of its weights' file; arguments as in `export`."""

    def __call__(
        self,
        folder: str | os.PathLike[str],
        model: nn.Module,
        manifest: Manifest,
        config: Mapping[str, Any],
        example: Any,
    ) -> int: ...


FORMATS: dict[str, Exporter] = {COMPRESSED_TENSORS: export_compressed, "gguf": export_gguf, "onnx": export_onnx}
"""{name of a format: what writes it}. A new format is a file in this folder and an entry here."""


def export(
    folder: str | os.PathLike[str],
    format: str,
    model: nn.Module,
    manifest: Manifest,
    config: Mapping[str, Any],
    example: Any,
) -> int:
    """Write a quantized model in another format.

    Args:
        folder: Folder to write; its files of these names are replaced together, others stay.
        format: "compressed-tensors": model.safetensors and config.json for plain transformers and vLLM, of policies of
            transformers models over Linear and Embedding layers, inputs included; read with the extra of that name.
            "gguf": model.gguf for llama.cpp, and tensor-types.txt for its llama-quantize, of policies made for
            target="gguf"; needs the extra "gguf".
            "onnx": model.onnx with QuantizeLinear and DequantizeLinear nodes; needs the extra "onnx".
        model: The network with its quantizers or packed weights.
        manifest: What its packed file says.
        config: Content of the library's config.json.
        example: One sample, a tuple of positional arguments or a mapping of keyword arguments.

    Returns:
        Bytes of the file that holds the weights.

    Raises:
        InvalidArgument: There is no such format.
        HubMPQError: The format cannot express the model.
    """
    if format not in FORMATS:
        raise InvalidArgument(f"unknown format {format!r}; known: {', '.join(FORMATS)}")
    with atomic_folder(folder) as work:
        return FORMATS[format](work, model, manifest, config, example)
