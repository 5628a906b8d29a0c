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

from ..errors import HubMPQError, PackedFormat, PolicyMismatch
from ..nn.swap import quantized_layers, swap_policy
from ..pack import (
    Manifest,
    PackedTensor,
    file_nbytes,
    pack_weight,
    read_indicators,
    read_packed,
    write_indicators,
    write_packed,
)
from ..quantizers import LSQ
from ..spec import FLOAT_BITS, Indicators

PACKED = "model.mpq.safetensors"
INDICATORS = "indicators.safetensors"
CONFIG = "config.json"
_QUANTIZER = (".weight_quantizer.", ".input_quantizer.")


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
    for key, tensor in model.state_dict().items():
        if key not in skip and not any(part in f".{key}" for part in _QUANTIZER):
            out[key] = tensor.detach().cpu()
    return out


def predicted_nbytes(model: nn.Module, manifest: Manifest) -> int:
    """Bytes of the packed file of a float `model` at the manifest's policy, to the byte, before anything is packed."""
    from ..pack import empty_packed

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
        if key not in skip and not any(part in f".{key}" for part in _QUANTIZER):
            out[key] = torch.empty_like(tensor, device="meta")
    return file_nbytes(out, manifest)


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
        text = json.dumps({**config, "quantization_config": quantization}, indent=2, sort_keys=True) + "\n"
        (work / CONFIG).write_text(text)
        if indicators is not None:
            write_indicators(work / INDICATORS, indicators)
        size = write_packed(work / PACKED, packed_tensors(model, manifest), manifest)
        target.mkdir(exist_ok=True)
        for path in sorted(work.iterdir(), key=lambda p: p.name == PACKED):
            os.replace(path, target / path.name)
    except OSError as error:
        raise HubMPQError(f"{target} cannot be written: {error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return size


def load_packed(path: str | os.PathLike[str], skeleton: nn.Module) -> Manifest:
    """Turn `skeleton` (the float model, any weights) into the packed model at `path`, in place.

    Raises PackedFormat for a bad file, PolicyMismatch when the file is for another model.
    """
    tensors, manifest = read_packed(path)
    modules = dict(skeleton.named_modules())
    shapes = {n: tuple(m.weight.shape) for n, m in modules.items() if isinstance(getattr(m, "weight", None), Tensor)}
    wrong = [layer.name for layer in manifest.graph if shapes.get(layer.name) != layer.weight_shape]
    if wrong:
        raise PolicyMismatch((), wrong)
    swap_policy(skeleton, manifest.graph, manifest.policy)
    load_quantized(path, skeleton, tensors)
    return manifest


@torch.no_grad()
def load_quantized(path: object, model: nn.Module, tensors: Mapping[str, PackedTensor | Tensor]) -> None:
    """Fill a swapped model with packed tensors: weights on their grids, scales, everything else."""
    rest = dict(tensors)
    for name, module in quantized_layers(model):
        packed = rest.pop(name, None)
        if isinstance(packed, PackedTensor):
            module.weight.copy_(packed.dequantize())
            q = module.weight_quantizer
            if packed.weight_scale.numel() != q.base.shape[1]:  # saved with one scale per tensor
                fresh = LSQ(q.widths, signed=True, channels=packed.weight_scale.numel(), axis=q.axis)
                module.weight_quantizer = q = fresh
            q.init(packed.num_bits, packed.weight_scale)
        rest[f"{name}.weight"] = module.weight
        if module.input_quantizer is not None:
            scale = rest.pop(f"{name}.input_scale")
            zero = rest.pop(f"{name}.input_zero_point", torch.zeros(1))
            module.input_quantizer.init(module.input_quantizer.widths[0], scale.reshape(1), int(zero))
    own = model.state_dict()
    expected = {k for k in own if not any(part in f".{k}" for part in _QUANTIZER)}
    missing, extra = expected - set(rest), set(rest) - expected
    if missing or extra:
        raise PackedFormat(path, f"tensors missing {sorted(missing)[:4]}, unknown {sorted(extra)[:4]}")
    for key in expected:
        if tuple(own[key].shape) != tuple(rest[key].shape):
            shape = tuple(own[key].shape)
            raise PackedFormat(path, f"tensor {key!r}: shape {tuple(rest[key].shape)}, expected {shape}")
    model.load_state_dict(rest, strict=False)


def read_folder_indicators(folder: str | os.PathLike[str]) -> Indicators | None:
    """Indicators stored in a folder, None when there are none."""
    path = Path(folder) / INDICATORS
    return read_indicators(path) if path.is_file() else None
