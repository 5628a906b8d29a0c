"""Packed models on disk: one safetensors file, specified in FORMAT.md."""

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
    """Compute the size of the length field and header that `write_packed` writes.

    Whatever the bit-widths, the header is as long as with all weights at 8 bits (in version 2 with the smallest groups
    and zero points), and has room for 2048 bytes of provenance. So the size of a file is a sum over its layers, and
    known before the figures of the provenance are.

    Args:
        tensors: As for `write_packed`; tensors may be on the meta device.
        manifest: The manifest.

    Returns:
        Size in bytes.

    Raises:
        InvalidArgument: A tensor cannot be stored, or the manifest is not JSON.
        PolicyMismatch: The policy is for other layers.

    Example:
        >>> import torch
        >>> from hub_mpq import HubMPQ
        >>> from hub_mpq.pack import header_nbytes, read_shapes
        >>> mpq = HubMPQ.from_pretrained("test_resnet", pretrained=False, input_size=(3, 32, 32))
        >>> _ = mpq.apply_policy("W4A4", [torch.zeros(1, 3, 32, 32)]).save_pretrained("packed")
        >>> tensors, manifest = read_shapes("packed/model.mpq.safetensors")
        >>> header_nbytes(tensors, manifest) % 8
        0
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
    """The form of a tensor with the longest entry in the header."""
    if not isinstance(value, PackedTensor):
        return value
    if grouped and layer_kinds.get(value.kind).row_axes is not None:
        return empty_packed(value.kind, value.weight_shape, LayerBits(8, 8, 8, False))
    wide = empty_packed(value.kind, value.weight_shape, LayerBits(8, 8))
    return replace(wide, weight_scale=value.weight_scale, weight_zero_point=value.weight_zero_point)


def file_nbytes(tensors: Tensors, manifest: Manifest) -> int:
    """Compute the exact size of the file that `write_packed` writes.

    Args:
        tensors: As for `write_packed`; tensors may be on the meta device, see `empty_packed`.
        manifest: The manifest.

    Returns:
        Size in bytes.

    Raises:
        InvalidArgument: A tensor cannot be stored, or the manifest is not JSON.
        PolicyMismatch: The policy is for other layers.

    Example:
        >>> import torch
        >>> from hub_mpq import HubMPQ
        >>> from hub_mpq.pack import file_nbytes, read_shapes
        >>> mpq = HubMPQ.from_pretrained("test_resnet", pretrained=False, input_size=(3, 32, 32))
        >>> _ = mpq.apply_policy("W4A4", [torch.zeros(1, 3, 32, 32)]).save_pretrained("packed")
        >>> from pathlib import Path
        >>> file = Path("packed/model.mpq.safetensors")
        >>> file_nbytes(*read_shapes(file)) == file.stat().st_size
        True
    """
    entries = header.place(container.describe(flatten(tensors)))
    return header_nbytes(tensors, manifest) + (entries[-1].end if entries else 0)


def write_packed(path: str | os.PathLike[str], tensors: Tensors, manifest: Manifest) -> int:
    """Write a packed model atomically; on an error, an existing file is not changed.

    Args:
        path: The file.
        tensors: `{layer name: PackedTensor}` for each weight that the policy quantizes, and every other tensor under
            its name in the state dict, in its own dtype. For each input that the policy quantizes,
            `<layer>.input_scale` (float32, one value) and, unless it is zero, `<layer>.input_zero_point` (an integer).
        manifest: The manifest.

    Returns:
        Size of the file in bytes.

    Raises:
        InvalidArgument: Tensors and manifest disagree.
        PolicyMismatch: The policy is for other layers.
        HubMPQError: The file cannot be written.

    Example:
        >>> import torch
        >>> from hub_mpq import HubMPQ
        >>> from hub_mpq.pack import read_packed, write_packed
        >>> mpq = HubMPQ.from_pretrained("test_resnet", pretrained=False, input_size=(3, 32, 32))
        >>> _ = mpq.apply_policy("W4A4", [torch.zeros(1, 3, 32, 32)]).save_pretrained("packed")
        >>> tensors, manifest = read_packed("packed/model.mpq.safetensors")
        >>> size = write_packed("copy.mpq.safetensors", tensors, manifest)
    """
    text = manifest.to_text()
    for name, value in tensors.items():
        level = manifest.policy.bits.get(name)
        if isinstance(value, PackedTensor) and (level is None or level.of_weight != value.bits):
            raise InvalidArgument(f"layer {name!r} is packed as {value.bits}, but the policy has {level}")
    flat = flatten(tensors)
    assemble(flat, manifest)
    return container.write(path, WEIGHTS, text, flat, header_nbytes(tensors, manifest) - 8, manifest.format_version)


def read_packed(path: str | os.PathLike[str]) -> tuple[dict[str, PackedTensor | Tensor], Manifest]:
    """Read a packed model, verifying every byte.

    The tensors share one buffer of the file's size; nothing else of that size is allocated.

    Args:
        path: The file.

    Returns:
        `(tensors, manifest)`, as passed to `write_packed`.

    Raises:
        PackedFormat: The content is invalid; the error names the file and, where it applies, the tensor.
        OSError: The file cannot be opened.

    Example:
        >>> import torch
        >>> from hub_mpq import HubMPQ
        >>> from hub_mpq.pack import read_packed
        >>> mpq = HubMPQ.from_pretrained("test_resnet", pretrained=False, input_size=(3, 32, 32))
        >>> _ = mpq.apply_policy("W4A4", [torch.zeros(1, 3, 32, 32)]).save_pretrained("packed")
        >>> tensors, manifest = read_packed("packed/model.mpq.safetensors")
        >>> str(tensors["layer1.0.conv1"].bits), str(manifest.policy.bits["layer1.0.conv1"])
        ('W4A32', 'W4A4')
    """
    head, flat = container.read(path, WEIGHTS)
    try:
        manifest = Manifest.from_text(head.manifest, head.version)
        return assemble(flat, manifest), manifest
    except InvalidArgument as error:
        raise PackedFormat(path, str(error)) from None


def read_shapes(path: str | os.PathLike[str]) -> tuple[dict[str, PackedTensor | Tensor], Manifest]:
    """Read a packed model with tensors on the meta device; verifies only the header and the file's size.

    Args:
        path: The file.

    Returns:
        `(tensors, manifest)`, as of `read_packed`, without values.

    Raises:
        PackedFormat: The content is invalid.
        OSError: The file cannot be opened.

    Example:
        >>> import torch
        >>> from hub_mpq import HubMPQ
        >>> from hub_mpq.pack import read_shapes
        >>> mpq = HubMPQ.from_pretrained("test_resnet", pretrained=False, input_size=(3, 32, 32))
        >>> _ = mpq.apply_policy("W4A4", [torch.zeros(1, 3, 32, 32)]).save_pretrained("packed")
        >>> tensors, manifest = read_shapes("packed/model.mpq.safetensors")
        >>> tensors["layer1.0.conv1"].weight_packed.device
        device(type='meta')
    """
    try:
        head = container.read_header(path, WEIGHTS)
        manifest = Manifest.from_text(head.manifest, head.version)
        return assemble(container.meta_tensors(head), manifest), manifest
    except InvalidArgument as error:
        raise PackedFormat(path, str(error)) from None


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """Read only the manifest; verifies the header and the file's size, but not the tensors.

    Args:
        path: The file.

    Returns:
        The manifest.

    Raises:
        PackedFormat: The content is invalid.
        OSError: The file cannot be opened.

    Example:
        >>> import torch
        >>> from hub_mpq import HubMPQ
        >>> from hub_mpq.pack import read_manifest
        >>> mpq = HubMPQ.from_pretrained("test_resnet", pretrained=False, input_size=(3, 32, 32))
        >>> _ = mpq.apply_policy("W4A4", [torch.zeros(1, 3, 32, 32)]).save_pretrained("packed")
        >>> manifest = read_manifest("packed/model.mpq.safetensors")
        >>> manifest.base_model, manifest.library
        ('test_resnet', 'timm')
    """
    try:
        head = container.read_header(path, WEIGHTS)
        return Manifest.from_text(head.manifest, head.version)
    except InvalidArgument as error:
        raise PackedFormat(path, str(error)) from None


def parse_manifest(first_bytes: bytes, file: str) -> Manifest:
    """Parse the manifest from the first bytes of a file, such as those of a range request.

    Args:
        first_bytes: The 8 bytes of the length field and at least as many bytes as it says.
        file: Name of the file for error messages.

    Returns:
        The manifest.

    Raises:
        PackedFormat: The bytes are invalid or too few.

    Example:
        >>> import torch
        >>> from hub_mpq import HubMPQ
        >>> from hub_mpq.pack import parse_manifest
        >>> mpq = HubMPQ.from_pretrained("test_resnet", pretrained=False, input_size=(3, 32, 32))
        >>> _ = mpq.apply_policy("W4A4", [torch.zeros(1, 3, 32, 32)]).save_pretrained("packed")
        >>> from pathlib import Path
        >>> content = Path("packed/model.mpq.safetensors").read_bytes()
        >>> size = int.from_bytes(content[:8], "little")
        >>> parse_manifest(content[: 8 + size], "model.mpq.safetensors").base_model
        'test_resnet'
    """
    try:
        size = header.header_nbytes_of(first_bytes[:8], len(first_bytes))
        head = header.decode(first_bytes[:size], WEIGHTS)
        return Manifest.from_text(head.manifest, head.version)
    except InvalidArgument as error:
        raise PackedFormat(file, str(error)) from None
