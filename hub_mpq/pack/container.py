"""Tensors and a manifest in one safetensors file with a digest: what weights and indicators share."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from typing import BinaryIO

import torch
from torch import Tensor

from ..errors import InvalidArgument, PackedFormat
from .atomic import write_atomic
from .header import ITEM_BYTES, Entry, Header, decode, encode, header_nbytes_of, place

_DTYPES = {
    "F64": torch.float64,
    "I64": torch.int64,
    "F32": torch.float32,
    "I32": torch.int32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_CHUNK = 1 << 20


def describe(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{name: (dtype, shape)} as the header writes them; tensors on the meta device will do."""
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES or tensor.layout != torch.strided or not name or name == "__metadata__":
            raise InvalidArgument(f"tensor {name!r}, {tensor.dtype} {tensor.layout}, cannot be stored")
    return {name: (_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}


def write(
    path: str | os.PathLike[str],
    content: str,
    manifest: str,
    tensors: Mapping[str, Tensor],
    room: int,
    version: int = 1,
) -> int:
    """Write the file atomically, its header padded to `room` bytes; return the bytes written."""
    entries = place(describe(tensors))
    if empty := [name for name, tensor in tensors.items() if tensor.is_meta]:
        raise InvalidArgument(f"tensor {empty[0]!r} is on the meta device: it has no values to write")
    flat = {e.name: tensors[e.name].detach().to("cpu").contiguous().reshape(-1).view(torch.uint8) for e in entries}
    payload = [flat[e.name].numpy().data for e in entries if e.end > e.begin]
    digest = hashlib.sha256()
    for part in payload:
        digest.update(part)
    return write_atomic(path, [encode(content, manifest, entries, digest.hexdigest(), room, version), *payload])


def _read_header(path: str | os.PathLike[str], file: BinaryIO, content: str) -> tuple[Header, int]:
    info = os.fstat(file.fileno())
    if not stat.S_ISREG(info.st_mode):
        raise InvalidArgument("not a regular file")
    first = file.read(8)
    raw = first + file.read(header_nbytes_of(first, info.st_size) - 8)
    header = decode(raw, content)
    expected = header.nbytes + header.payload_nbytes
    if info.st_size != expected:
        which = "truncated" if info.st_size < expected else "too long"
        raise InvalidArgument(f"{which}: {info.st_size} bytes, its header speaks of {expected}")
    return header, info.st_size


def read_header(path: str | os.PathLike[str], content: str) -> Header:
    """The header of a file, verified against its own digest and the file's size; PackedFormat if anything is wrong."""
    try:
        with open(path, "rb", opener=_open) as file:
            return _read_header(path, file, content)[0]
    except InvalidArgument as error:
        raise PackedFormat(path, str(error)) from None


def meta_tensors(header: Header) -> dict[str, Tensor]:
    """The tensors that a header speaks of, on the meta device."""
    return {e.name: torch.empty(e.shape, dtype=_DTYPES[e.dtype], device="meta") for e in header.entries}


def read(path: str | os.PathLike[str], content: str) -> tuple[Header, dict[str, Tensor]]:
    """Header and tensors, all of them verified. The tensors lie in one buffer of the payload's size.

    PackedFormat for whatever is wrong with the content; OSError when the file cannot be opened.
    """
    try:
        with open(path, "rb", opener=_open) as file:
            header, _ = _read_header(path, file, content)
            buffer = bytearray(header.payload_nbytes)
            digest = hashlib.sha256()
            for chunk in _fill(file, memoryview(buffer)):
                digest.update(chunk)
        if digest.hexdigest() != header.payload_sha256:
            raise InvalidArgument("the tensors do not match their digest: torn or tampered with")
        return header, {entry.name: _tensor(buffer, entry) for entry in header.entries}
    except InvalidArgument as error:
        raise PackedFormat(path, str(error)) from None


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # a pipe must not make us wait


def _fill(file: BinaryIO, view: memoryview) -> Iterator[memoryview]:
    """Fill `view` from the file, chunk by chunk, each handed out while it is in cache."""
    while view.nbytes:
        chunk = view[:_CHUNK]
        got = file.readinto(chunk)  # type: ignore[attr-defined]
        if not got:
            raise InvalidArgument("truncated while it was read")
        yield chunk[:got]
        view = view[got:]


def _tensor(buffer: bytearray, entry: Entry) -> Tensor:
    dtype = _DTYPES[entry.dtype]
    if entry.begin == entry.end:
        return torch.empty(entry.shape, dtype=dtype)
    count = (entry.end - entry.begin) // ITEM_BYTES[entry.dtype]
    if dtype is torch.bool:
        values = torch.frombuffer(buffer, dtype=torch.uint8, count=count, offset=entry.begin)
        if int(values.max()) > 1:
            raise InvalidArgument(f"tensor {entry.name!r}: a BOOL is 0 or 1")
    return torch.frombuffer(buffer, dtype=dtype, count=count, offset=entry.begin).reshape(entry.shape)
