"""A quantized model as a Hub-shaped folder, and back."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import HubMPQError
from ..nn.packed import packed_layers
from ..nn.swap import quantized_layers
from ..pack import (
    Manifest,
    PackedTensor,
    empty_packed,
    file_nbytes,
    layout,
    pack_weight,
    read_indicators,
    write_indicators,
    write_packed,
)
from ..pack.layout import key as part_key
from ..spec import FLOAT_BITS, Indicators

PACKED = "model.mpq.safetensors"
INDICATORS = "indicators.safetensors"
CONFIG = "config.json"
FLOAT_COPY = "model.safetensors"
MANIFEST = "mpq_manifest.json"
"""Policy, graph and provenance in words, where no packed file holds them; and the mark of such a repo as ours."""
QUANTIZER_KEYS = (".weight_quantizer.", ".input_quantizer.")
"""Parts of state-dict keys that belong to quantizers: a file holds them in its own words."""


@torch.no_grad()
def packed_tensors(model: nn.Module, manifest: Manifest) -> dict[str, PackedTensor | Tensor]:
    """What a packed file holds: integers of the quantized weights, scales, and every other tensor as it is."""
    graph = manifest.graph
    out: dict[str, PackedTensor | Tensor] = {}
    skip: set[str] = set()
    for name, module in quantized_layers(model):
        skip.add(f"{name}.weight")
        q = module.weight_quantizer
        if graph[name].weight_owner is None:
            integers = q.to_int(module.weight).cpu()
            out[name] = pack_weight(integers, q.scale.detach().cpu(), graph[name].kind, q.spec.num_bits)
        if module.input_quantizer is not None:
            out[f"{name}.input_scale"] = module.input_quantizer.scale.detach().cpu()
            zero = torch.tensor([module.input_quantizer.zero_point], dtype=torch.int32)
            out[f"{name}.input_zero_point"] = zero
    for name, module in packed_layers(model):
        if not module.owner:
            out[name] = module.packed
            skip |= {part_key(name, part) for part in module.packed.parts()}
    for key, tensor in model.state_dict().items():
        if key not in skip and not any(part in f".{key}" for part in QUANTIZER_KEYS):
            out[key] = tensor.detach().cpu()
    return out | _guard(manifest, "cpu")


def _guard(manifest: Manifest, device: str) -> dict[str, PackedTensor | Tensor]:
    """A float weight without elements beside the first packed one of a hub's model: who loads the packed file as if it
    were float weights (renamed, say) meets a wrong shape; plain transformers would draw new weights."""
    if manifest.library == "module":
        return {}
    names = list(layout.packed_layers(manifest))[:1]
    return {part_key(name, "weight"): torch.empty(0, device=device) for name in names}


def predicted_nbytes(model: nn.Module, manifest: Manifest) -> int:
    """Bytes of the packed file of a float `model` at the manifest's policy, to the byte, before anything is packed."""
    graph, bits = manifest.graph, manifest.policy.bits
    out: dict[str, PackedTensor | Tensor] = {}
    skip = set()
    for layer in graph:
        level = bits[layer.name]
        if level.weight != FLOAT_BITS:
            skip.add(f"{layer.name}.weight")
            if layer.weight_owner is None:
                out[layer.name] = empty_packed(layer.kind, layer.weight_shape, level.weight)
        if level.activation != FLOAT_BITS:
            out[f"{layer.name}.input_scale"] = torch.empty(1, device="meta")
            out[f"{layer.name}.input_zero_point"] = torch.empty(1, dtype=torch.int32, device="meta")
    for key, tensor in model.state_dict().items():
        if key not in skip and not any(part in f".{key}" for part in QUANTIZER_KEYS):
            out[key] = torch.empty_like(tensor, device="meta")
    return file_nbytes(out | _guard(manifest, "meta"), manifest)


def save_folder(
    folder: str | os.PathLike[str],
    model: nn.Module,
    manifest: Manifest,
    config: Mapping[str, Any],
    indicators: Indicators | None = None,
    extra: Mapping[str, bytes] | None = None,
) -> int:
    """Write config.json, the packed file and, if given, indicators and extra files; returns the packed bytes.

    Everything is written beside the folder first and moved in at the end, the packed file last: a failure leaves
    what was there. Raises HubMPQError when the disk refuses.
    """
    target = Path(folder)
    quantization = {
        "quant_method": "mpq",
        "format_version": manifest.format_version,
        "policy": manifest.policy.to_dict(),
    }
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and not target.is_dir():
            raise HubMPQError(f"{target} is a file; save_pretrained writes a folder")
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise HubMPQError(f"{target} cannot be written: {error}") from error
    try:
        for name, content in (extra or {}).items():
            (work / name).write_bytes(content)
        public = {k: v for k, v in config.items() if k != "_name_or_path"}  # a path on this machine
        text = json.dumps({**public, "quantization_config": quantization}, indent=2, sort_keys=True) + "\n"
        (work / CONFIG).write_text(text)
        if indicators is not None:
            write_indicators(work / INDICATORS, indicators)
        size = write_packed(work / PACKED, packed_tensors(model, manifest), manifest)
        target.mkdir(exist_ok=True)
        if indicators is None:  # those of another model must not stay
            (target / INDICATORS).unlink(missing_ok=True)
        for path in sorted(work.iterdir(), key=lambda p: p.name == PACKED):
            os.replace(path, target / path.name)
    except OSError as error:
        raise HubMPQError(f"{target} cannot be written: {error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return size


def read_folder_indicators(folder: str | os.PathLike[str]) -> Indicators | None:
    """Indicators stored in a folder, None when there are none."""
    path = Path(folder) / INDICATORS
    return read_indicators(path) if path.is_file() else None
