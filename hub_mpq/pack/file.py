"""Packed models on disk: one safetensors file, described to the byte in FORMAT.md."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from ..core import LayerBits, layer_kinds
from ..errors import InvalidArgument, PackedFormat
from . import container, header
from .canonical import dump_json
from .layout import assemble, flatten
from .manifest import PROVENANCE_RESERVE, Manifest
from .tensor import PackedTensor, empty_packed

WEIGHTS = "mpq-weights"
Tensors = Mapping[str, PackedTensor | Tensor]


def header_nbytes(tensors: Tensors, manifest: Manifest) -> int:
    """Bytes of length field and header of the file `write_packed` would write; tensors on the meta device will do.

    It is what all weights at 8 bits would need, whatever their widths, in version 2 with the smallest groups and zero
    points, and holds a provenance of up to PROVENANCE_RESERVE bytes: so the size of a file is a sum over its layers,
    known before its figures are.
    """
    grouped = manifest.format_version > 1
    wide = {name: _widest(value, grouped) for name, value in tensors.items()}
    spare = max(0, PROVENANCE_RESERVE - len(dump_json(dump_json(dict(manifest.provenance))).encode()))
    if grouped:
        spare += sum(_LONGEST - len(str(bits)) for bits in manifest.policy.bits.values())
    entries = header.place(container.describe(flatten(wide)))
    size = header.rendered_nbytes(WEIGHTS, manifest.to_text(), entries) + spare
    return 8 + -(-size // 8) * 8


_LONGEST = len(str(LayerBits(8, 32, 10**6 - 1, False)))


def _widest(value: PackedTensor | Tensor, grouped: bool) -> PackedTensor | Tensor:
    """The form of a tensor that takes the longest entry in the header."""
    if not isinstance(value, PackedTensor):
        return value
    if grouped and layer_kinds.get(value.kind).row_axes is not None:
        return empty_packed(value.kind, value.weight_shape, LayerBits(8, 8, 8, False))
    wide = empty_packed(value.kind, value.weight_shape, LayerBits(8, 8))
    return replace(wide, weight_scale=value.weight_scale, weight_zero_point=value.weight_zero_point)


def file_nbytes(tensors: Tensors, manifest: Manifest) -> int:
    """Exact bytes of the file `write_packed` would write; tensors on the meta device will do (empty_packed)."""
    entries = header.place(container.describe(flatten(tensors)))
    return header_nbytes(tensors, manifest) + (entries[-1].end if entries else 0)


def write_packed(path: str | os.PathLike[str], tensors: Tensors, manifest: Manifest) -> int:
    """Write a packed model atomically and return its bytes.

    `tensors`: {layer name: PackedTensor} for every weight the policy packs, and every other tensor under its
    state-dict name in its own dtype; `<layer>.input_scale` (float32, one value) and, if need be,
    `<layer>.input_zero_point` (an integer) where the policy quantizes an input. InvalidArgument or PolicyMismatch
    when tensors and manifest disagree, HubMPQError when the disk refuses; the old file then stays as it was.
    """
    text = manifest.to_text()
    for name, value in tensors.items():
        level = manifest.policy.bits.get(name)
        if isinstance(value, PackedTensor) and (level is None or level.of_weight != value.bits):
            raise InvalidArgument(f"layer {name!r} is packed as {value.bits}, the policy says {level}")
    flat = flatten(tensors)
    assemble(flat, manifest)
    return container.write(path, WEIGHTS, text, flat, header_nbytes(tensors, manifest) - 8, manifest.format_version)


def read_packed(path: str | os.PathLike[str]) -> tuple[dict[str, PackedTensor | Tensor], Manifest]:
    """Tensors, as write_packed took them, and manifest. Every byte is verified before anything is believed.

    PackedFormat, naming the file and where it applies the tensor, for any other content; OSError when it cannot be
    opened. The tensors share one buffer of the file's size; nothing else of that size is allocated.
    """
    head, flat = container.read(path, WEIGHTS)
    try:
        manifest = Manifest.from_text(head.manifest, head.version)
        return assemble(flat, manifest), manifest
    except InvalidArgument as error:
        raise PackedFormat(path, str(error)) from None


def read_shapes(path: str | os.PathLike[str]) -> tuple[dict[str, PackedTensor | Tensor], Manifest]:
    """As `read_packed`, with tensors on the meta device: reads and verifies the header and the file's size alone."""
    try:
        head = container.read_header(path, WEIGHTS)
        manifest = Manifest.from_text(head.manifest, head.version)
        return assemble(container.meta_tensors(head), manifest), manifest
    except InvalidArgument as error:
        raise PackedFormat(path, str(error)) from None


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """The manifest alone: reads and verifies the header and the file's size, not the tensors."""
    try:
        head = container.read_header(path, WEIGHTS)
        return Manifest.from_text(head.manifest, head.version)
    except InvalidArgument as error:
        raise PackedFormat(path, str(error)) from None


def parse_manifest(first_bytes: bytes, file: str) -> Manifest:
    """The manifest from the first bytes of a file (a range request): 8, then as many as they say.

    `file` names it in errors. PackedFormat when the bytes are wrong or too few.
    """
    try:
        size = header.header_nbytes_of(first_bytes[:8], len(first_bytes))
        head = header.decode(first_bytes[:size], WEIGHTS)
        return Manifest.from_text(head.manifest, head.version)
    except InvalidArgument as error:
        raise PackedFormat(file, str(error)) from None
