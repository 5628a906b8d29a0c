"""The container that packed weights and indicators share: one safetensors file with tensors, manifest and digests."""

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
    """{name: (dtype, shape)} as in the header; tensors may be on the meta device."""
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES or tensor.layout != torch.strided or not name or name == "__metadata__":
            raise InvalidArgument(f"cannot store tensor {name!r} of type {tensor.dtype}, {tensor.layout}")
    return {name: (_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}


def write(
    path: str | os.PathLike[str],
    content: str,
    manifest: str,
    tensors: Mapping[str, Tensor],
    room: int,
    version: int = 1,
) -> int:
    """Write the file atomically, with its header padded to `room` bytes; returns the bytes written."""
    entries = place(describe(tensors))
    if empty := [name for name, tensor in tensors.items() if tensor.is_meta]:
        raise InvalidArgument(f"cannot write tensor {empty[0]!r}: it is on the meta device and has no values")
    flat = {e.name: tensors[e.name].detach().to("cpu").contiguous().reshape(-1).view(torch.uint8) for e in entries}
    payload = [flat[e.name].numpy().data for e in entries if e.end > e.begin]
    digest = hashlib.sha256()
    for part in payload:
        digest.update(part)
    return write_atomic(path, [encode(content, manifest, entries, digest.hexdigest(), room, version), *payload])


def _read_header(path: str | os.PathLike[str], file: BinaryIO, content: str) -> tuple[Header, int]:
    info = os.fstat(file.fileno())
    if not stat.S_ISREG(info.st_mode):
        raise InvalidArgument("expected a regular file")
    first = file.read(8)
    raw = first + file.read(header_nbytes_of(first, info.st_size) - 8)
    header = decode(raw, content)
    expected = header.nbytes + header.payload_nbytes
    if info.st_size != expected:
        which = "truncated" if info.st_size < expected else "too long"
        raise InvalidArgument(f"the file is {which}: expected {expected} bytes, got {info.st_size}")
    return header, info.st_size


def read_header(path: str | os.PathLike[str], content: str) -> Header:
    """Read the header of a file, verified against its digest and the file's size; raises PackedFormat if invalid."""
    try:
        with open(path, "rb", opener=_open) as file:
            return _read_header(path, file, content)[0]
    except InvalidArgument as error:
        raise PackedFormat(path, str(error)) from None


def meta_tensors(header: Header) -> dict[str, Tensor]:
    """The tensors of a header, on the meta device."""
    return {e.name: torch.empty(e.shape, dtype=_DTYPES[e.dtype], device="meta") for e in header.entries}


def read(path: str | os.PathLike[str], content: str) -> tuple[Header, dict[str, Tensor]]:
    """Read and verify header and tensors, which share one buffer of the payload's size.

    Raises:
        PackedFormat: The content is invalid.
        OSError: The file cannot be opened.
    """
    try:
        with open(path, "rb", opener=_open) as file:
            header, _ = _read_header(path, file, content)
            buffer = bytearray(header.payload_nbytes)
            digest = hashlib.sha256()
            for chunk in _fill(file, memoryview(buffer)):
                digest.update(chunk)
        if digest.hexdigest() != header.payload_sha256:
            raise InvalidArgument("the tensors do not match their digest; the file is damaged or was modified")
        return header, {entry.name: _tensor(buffer, entry) for entry in header.entries}
    except InvalidArgument as error:
        raise PackedFormat(path, str(error)) from None


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # opening a pipe must not block


def _fill(file: BinaryIO, view: memoryview) -> Iterator[memoryview]:
    """Fill `view` from the file, yielding each chunk while it is in cache."""
    while view.nbytes:
        chunk = view[:_CHUNK]
        got = file.readinto(chunk)  # type: ignore[attr-defined]
        if not got:
            raise InvalidArgument("the file was truncated while reading")
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
            raise InvalidArgument(f"tensor {entry.name!r}: BOOL values must be 0 or 1")
    return torch.frombuffer(buffer, dtype=dtype, count=count, offset=entry.begin).reshape(entry.shape)
