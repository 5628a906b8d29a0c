"""The header of hub_mpq's safetensors files: written in one canonical form, and read without trusting it.

FORMAT.md specifies it. The first keys of the metadata are at fixed positions, so that the version and the digest are
checked before anything is parsed.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import InvalidArgument
from .canonical import dump_json, load_json

FORMAT_VERSION = 2
"""The newest version. Files are written in the oldest version that can represent them; all versions are read."""
MAX_HEADER = 1 << 24
"""16 MiB, about 100,000 tensors. A larger header is rejected before it is read."""

ITEM_BYTES = {
    **{"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2},
    **{"I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1},
}
_VERSION = re.compile(rb'\{"__metadata__":\{"format":"pt","format_version":"([0-9]{1,9})","')
_START = re.compile(
    _VERSION.pattern + rb'content":"([a-z-]{1,40})","digest":"([0-9a-f]{64})",'
    rb'"payload_sha256":"([0-9a-f]{64})","manifest":'
)
_MAX_DIM = 2**63 - 1


@dataclass(frozen=True)
class Entry:
    """The position of a tensor: bytes `begin` to `end` of the payload; `dtype` in safetensors' notation."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """The content of a verified header.

    Args:
        entries: Positions of the tensors.
        manifest: The manifest, JSON.
        payload_sha256: Digest of the payload.
        nbytes: Size of the header with its length field.
        version: Version of the format.
    """

    entries: tuple[Entry, ...]
    manifest: str
    payload_sha256: str
    nbytes: int
    version: int

    @property
    def payload_nbytes(self) -> int:
        return self.entries[-1].end if self.entries else 0


def place(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[Entry, ...]:
    """Entries of {name: (dtype, shape)} in file order: larger items first, then by name, so that each is aligned."""
    entries, at = [], 0
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: (-ITEM_BYTES[item[1][0]], item[0])):
        end = at + ITEM_BYTES[dtype] * math.prod(shape)
        entries.append(Entry(name, dtype, tuple(shape), at, end))
        at = end
    return tuple(entries)


def _render(content: str, manifest: str, entries: Iterable[Entry], payload_sha256: str, version: int) -> str:
    metadata = {"format": "pt", "format_version": str(version), "content": content, "digest": "0" * 64}
    header: dict[str, Any] = {"__metadata__": {**metadata, "payload_sha256": payload_sha256, "manifest": manifest}}
    for e in entries:
        header[e.name] = {"dtype": e.dtype, "shape": list(e.shape), "data_offsets": [e.begin, e.end]}
    return dump_json(header, sort=False)


def rendered_nbytes(content: str, manifest: str, entries: Iterable[Entry]) -> int:
    """Size of the JSON, before padding and without the length field."""
    return len(_render(content, manifest, entries, "0" * 64, FORMAT_VERSION).encode())


def encode(
    content: str, manifest: str, entries: Iterable[Entry], payload_sha256: str, room: int, version: int = 1
) -> bytes:
    """Length field and header, padded with spaces to at least `room` and to a multiple of 8, digest filled in."""
    text = _render(content, manifest, entries, payload_sha256, version).encode()
    size = -(-max(room, len(text)) // 8) * 8
    if size > MAX_HEADER:
        raise InvalidArgument(f"the header must have at most {MAX_HEADER} bytes, got {size}")
    raw = size.to_bytes(8, "little") + text.ljust(size)
    at = 8 + _start(raw[8:]).start(3)
    return raw[:at] + hashlib.sha256(raw).hexdigest().encode() + raw[at + 64 :]


def _start(header: bytes) -> re.Match[bytes]:
    version = _VERSION.match(header)
    if version and not 1 <= int(version.group(1)) <= FORMAT_VERSION:
        found = int(version.group(1))
        raise InvalidArgument(
            f"unsupported format version {found}: this hub_mpq reads versions 1 to {FORMAT_VERSION}; upgrade it"
        )
    match = _START.match(header)
    if match is None:
        raise InvalidArgument("not a hub_mpq file: unexpected start of the header")
    return match


def header_nbytes_of(length_field: bytes, file_nbytes: int) -> int:
    """Size of length field and header together, from a file's first 8 bytes and its size."""
    if len(length_field) != 8:
        raise InvalidArgument(f"the file is truncated: expected at least 8 bytes, got {file_nbytes}")
    size = int.from_bytes(length_field, "little")
    if size > file_nbytes - 8:
        raise InvalidArgument(
            f"the header claims {size} bytes, but the file has {file_nbytes}; it is damaged or was modified"
        )
    if size > MAX_HEADER or size % 8:
        raise InvalidArgument(f"the header's size must be a multiple of 8 and at most {MAX_HEADER}, got {size}")
    return size + 8


def decode(raw: bytes, content: str) -> Header:
    """Parse the length field and header of a file of this `content`, digest first; raises InvalidArgument."""
    if header_nbytes_of(raw[:8], len(raw)) != len(raw):
        raise InvalidArgument("the header's length field is wrong")
    start = _start(raw[8:])
    version, kind, digest, payload = (start.group(i).decode() for i in range(1, 5))
    at = 8 + start.start(3)
    if hashlib.sha256(raw[:at] + b"0" * 64 + raw[at + 64 :]).hexdigest() != digest:
        raise InvalidArgument("the header does not match its digest; the file is damaged or was modified")
    if kind != content:
        raise InvalidArgument(f"expected content {content}, got {kind}")
    tree = load_json(raw[8:], "the header")
    if dump_json(tree, sort=False).encode() != raw[8:].rstrip(b" "):
        raise InvalidArgument("the header is not in canonical form")
    metadata = tree.pop("__metadata__")
    names = {"format", "format_version", "content", "digest", "payload_sha256", "manifest"}
    if set(metadata) != names or not isinstance(metadata["manifest"], str):
        raise InvalidArgument(f"the metadata must have the keys {', '.join(sorted(names))}")
    return Header(_entries(tree), metadata["manifest"], payload, len(raw), int(version))


def _entries(tree: Mapping[str, Any]) -> tuple[Entry, ...]:
    out, at = [], 0
    for name, row in tree.items():
        if not isinstance(row, dict) or list(row) != ["dtype", "shape", "data_offsets"]:
            raise InvalidArgument(f"tensor {name!r}: expected dtype, shape and data_offsets")
        dtype, shape, offsets = row.values()
        if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
            raise InvalidArgument(f"tensor {name!r}: unknown dtype {json.dumps(dtype)[:40]}")
        if not _sizes(shape) or len(shape) > 16 or math.prod(max(d, 1) for d in shape) > _MAX_DIM:
            raise InvalidArgument(f"tensor {name!r}: invalid shape {json.dumps(shape)[:80]}")
        if not _sizes(offsets) or len(offsets) != 2:
            raise InvalidArgument(f"tensor {name!r}: invalid data_offsets")
        end = at + ITEM_BYTES[dtype] * math.prod(shape)
        if offsets != [at, end] or at % ITEM_BYTES[dtype]:
            found = f"{offsets[0]} to {offsets[1]}"
            raise InvalidArgument(
                f"tensor {name!r}: expected bytes {at} to {end}, got {found} (overlap, gap or misalignment)"
            )
        out.append(Entry(name, dtype, tuple(shape), at, end))
        at = end
    return tuple(out)


def _sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v <= _MAX_DIM for v in value)
