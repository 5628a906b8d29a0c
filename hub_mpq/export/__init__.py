"""Export to the formats of other programs, on request; the packed file remains the default."""

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
    """Writes a quantized model to a folder and returns the size of its weight file; arguments as in `export`."""

    def __call__(
        self,
        folder: str | os.PathLike[str],
        model: nn.Module,
        manifest: Manifest,
        config: Mapping[str, Any],
        example: Any,
    ) -> int: ...


FORMATS: dict[str, Exporter] = {COMPRESSED_TENSORS: export_compressed, "gguf": export_gguf, "onnx": export_onnx}
"""{name of a format: its exporter}. To add a format, add a file to this folder and an entry here."""


def export(
    folder: str | os.PathLike[str],
    format: str,
    model: nn.Module,
    manifest: Manifest,
    config: Mapping[str, Any],
    example: Any,
) -> int:
    """Export a quantized model to the format of another program.

    The formats:

    - `"compressed-tensors"`: `model.safetensors` and `config.json` for transformers (with the package
      `compressed-tensors`) and vLLM. For policies over the Linear and Embedding layers of transformers models, with or
      without quantized inputs.
    - `"gguf"`: `model.gguf` for llama.cpp, and `tensor-types.txt` for its llama-quantize. For policies made with
      `target="gguf"`; requires the extra `gguf`.
    - `"onnx"`: `model.onnx` with QuantizeLinear and DequantizeLinear nodes; requires the extra `onnx`.

    `HubMPQ.export` calls this with the model's own manifest, configuration and example.

    Args:
        folder: Folder to write to; existing files of the same names are replaced together, others stay.
        format: Name of the format.
        model: The network, with quantizers or packed weights.
        manifest: The manifest of its packed file.
        config: Content of the library's `config.json`.
        example: One sample: a tuple of positional arguments or a mapping of keyword arguments.

    Returns:
        Size of the weight file in bytes.

    Raises:
        InvalidArgument: The format is unknown.
        HubMPQError: The format cannot represent the model, or a package is not installed.

    Example:
        >>> import torch
        >>> from hub_mpq import HubMPQ
        >>> from hub_mpq.export import export
        >>> from hub_mpq.pack import read_manifest
        >>> images = torch.zeros(1, 3, 32, 32)
        >>> mpq = HubMPQ.from_pretrained("test_resnet", pretrained=False, input_size=(3, 32, 32))
        >>> _ = mpq.apply_policy("W4A4", [images]).save_pretrained("packed")
        >>> manifest = read_manifest("packed/model.mpq.safetensors")
        >>> export("onnx", "onnx", mpq.model, manifest, {}, (images,))  # doctest: +SKIP
    """
    if format not in FORMATS:
        raise InvalidArgument(f"unknown format {format!r}; choose from {', '.join(FORMATS)}")
    with atomic_folder(folder) as work:
        return FORMATS[format](work, model, manifest, config, example)
