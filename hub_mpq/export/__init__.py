"""Other programs' formats. The packed file stays the default; these are written from it on demand."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..errors import InvalidArgument
from ..pack import Manifest
from .compressed_tensors import FORMAT, export_compressed
from .onnx import export_onnx


def export(
    folder: str | os.PathLike[str],
    format: str,
    model: nn.Module,
    manifest: Manifest,
    config: Mapping[str, Any],
    example: Any,
) -> int:
    """Write a quantized model in another format into a folder; returns the bytes of its weights' file.

    "compressed-tensors": model.safetensors and config.json for plain transformers and vLLM; weight-only policies of
    transformers models over Linear and Embedding layers; read with the extra of that name. "onnx": model.onnx with
    QuantizeLinear and DequantizeLinear nodes; needs the extra "onnx". Raises HubMPQError, in words, for what a
    format can't say, InvalidArgument for an unknown one.
    """
    if format == FORMAT:
        return export_compressed(folder, model, manifest, config)
    if format == "onnx":
        return export_onnx(folder, model, example)
    raise InvalidArgument(f"format is {FORMAT!r} or 'onnx', not {format!r}")
