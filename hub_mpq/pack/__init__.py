"""Bit-packed storage of quantized models: packed tensors, and the file format, which FORMAT.md specifies."""

from .bits import pack_bits, unpack_bits
from .file import file_nbytes, header_nbytes, parse_manifest, read_manifest, read_packed, read_shapes, write_packed
from .indicators import read_indicators, write_indicators
from .latency_table import write_latency_table
from .manifest import Manifest
from .tensor import PackedTensor, empty_packed, pack_weight

__all__ = [
    "Manifest",
    "PackedTensor",
    "empty_packed",
    "file_nbytes",
    "header_nbytes",
    "pack_bits",
    "pack_weight",
    "parse_manifest",
    "read_indicators",
    "read_manifest",
    "read_packed",
    "read_shapes",
    "unpack_bits",
    "write_indicators",
    "write_latency_table",
    "write_packed",
]
