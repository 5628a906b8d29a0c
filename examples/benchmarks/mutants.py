"""Packed files as a hostile author writes them: changed anywhere, with recomputed digests.

    mutants = Mutants(folder, seed=1)
    what, file = mutants.make()

`what` names the mutation, `file` is the content of model.mpq.safetensors. The same seed gives the same files.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import random
import struct
from pathlib import Path
from typing import Any

from hub_mpq.pack.header import ITEM_BYTES

ZEROS = "0" * 64
TEXTS = [
    *(
        "",
        "..",
        "../../etc/passwd",
        "a/b",
        "x" * 5000,
        "\u202e",
        "\x1b[31m",
        "a.b.c.d",
        "__class__",
        "weight",
        "é",
        " ",
    ),
    *("NaN", "W4A4", "W0A0", "W9A9", "W33A4", "W32A32", "W1A1", "W2A8", "W32A4", "W4A32", "W8A8", "W٤A٤", "W04A04"),
    *("linear", "conv2d", "conv1d", "embedding", "experts", "timm", "transformers", "module"),
]
NUMBERS = [
    *(0, 1, -1, 2, 3, 8, 9, 33, 255, 2**31, 2**31 - 1, 2**32, 2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**64, 10**9),
    *(10**18, 10**30, 1.5, 0.0, -0.0, 1e308, True, False),
]
SCALES = [1e-45, 1e-38, 3e38, 1.0, 0.5, math.nan, 0.0, -1.0, math.inf]
TOKENS = [
    *("NaN", "Infinity", "-0", "1e999", "{", "}", "[", "]", '"', "\\u0000", "\\ud800", "/*", "\u2028", '"a":1,"a":2,'),
    *(" ", "\t", "9" * 5000, "[" * 1500, '{"a":' * 1500, ",", "null", "true"),
]
PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")


def compact(tree: Any, *, sort: bool = False) -> str:
    return json.dumps(tree, ensure_ascii=False, separators=(",", ":"), sort_keys=sort)


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Return (header, payload) of a packed file."""
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def seal(text: str, payload: bytes) -> bytes:
    """Build a file from the text of a header, whose digests are zeros, and a payload; fill in both digests."""
    head = text.encode("utf-8", "surrogatepass")
    head = head.replace(b'payload_sha256":"' + ZEROS.encode(), b'payload_sha256":"' + _sha256(payload), 1)
    head += b" " * (-len(head) % 8)
    raw = len(head).to_bytes(8, "little") + head
    return raw.replace(b'"digest":"' + ZEROS.encode(), b'"digest":"' + _sha256(raw), 1) + payload


def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).hexdigest().encode()


class Mutants:
    """Generator of changed files.

    Args:
        folder: A folder written by save_pretrained.
        seed: Seed of the changes.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.data = (folder / "model.mpq.safetensors").read_bytes()
        self.header, self.payload = split(self.data)
        self.manifest = json.loads(self.header["__metadata__"]["manifest"])
        self.columns = self.manifest["layers"]["columns"]
        self.layers = [row[0] for row in self.manifest["layers"]["rows"]]
        self.names = [name for name in self.header if name != "__metadata__"]
        self.rng = random.Random(seed)
        manifest = (self.anything, self.cell, self.cell)
        self.ways = (self.bytes_of_the_file, *manifest, *[self.tensors] * 3, self.entry, self.text, self.values)

    def make(self) -> tuple[str, bytes]:
        """Return (mutation, file); the file differs from the original and is valid JSON where it is JSON."""
        while True:
            way = self.rng.choice(self.ways)
            try:
                data = way()
            except (RecursionError, ValueError, TypeError):
                continue
            if data != self.data:
                return way.__name__, data

    def _file(
        self, header: dict[str, Any] | None = None, payload: bytes | None = None, manifest: dict[str, Any] | None = None
    ) -> bytes:
        header = dict(header or self.header)
        metadata = {**header.pop("__metadata__"), "digest": ZEROS, "payload_sha256": ZEROS}
        if manifest is not None:
            self._digest(manifest)
            metadata["manifest"] = compact(manifest, sort=True)
        return seal(compact({"__metadata__": metadata, **header}), self.payload if payload is None else payload)

    def _digest(self, manifest: dict[str, Any]) -> None:
        try:
            at = [manifest["layers"]["columns"].index(key) for key in ("name", "kind", "weight_shape")]
            rows = sorted([[row[i] for i in at] for row in manifest["layers"]["rows"]], key=lambda row: row[0])
            text = json.dumps(rows, separators=(",", ":"))
            manifest["graph_digest"] = hashlib.sha256(text.encode()).hexdigest()
        except (KeyError, TypeError, ValueError, IndexError, AttributeError):
            pass

    def _value(self) -> Any:
        rng, kind = self.rng, self.rng.random()
        if kind < 0.35:
            return rng.choice([*TEXTS, *self.layers])
        if kind < 0.7:
            return rng.choice(NUMBERS)
        if kind < 0.8:
            return None
        if kind < 0.9:
            return [rng.choice(NUMBERS) for _ in range(rng.randint(0, 5))]
        if kind < 0.95:
            return {rng.choice(TEXTS): rng.choice(NUMBERS)}
        deep: Any = 0
        for _ in range(rng.choice([3, 50, 400])):
            deep = [deep] if rng.random() < 0.5 else {"a": deep}
        return deep

    def bytes_of_the_file(self) -> bytes:
        """Change bytes by accident: the digests are not recomputed."""
        data, rng = bytearray(self.data), self.rng
        for _ in range(rng.randint(1, 3)):
            at, other, what = rng.randrange(len(data) or 1), rng.randrange(len(data) or 1), rng.randrange(5)
            if what == 0 and data:
                data[at] ^= 1 << rng.randrange(8)
            elif what == 1:
                data[at:at] = rng.randbytes(rng.choice([1, 7, 8, 64]))
            elif what == 2:
                del data[at : at + rng.choice([1, 4, 8, 100, len(data)])]
            elif what == 3 and data:
                data[at], data[other] = data[other], data[at]
            else:
                data[at : at + 8] = struct.pack("<Q", rng.choice([0, 1, 2**63, 2**24, len(data)]))
        return bytes(data)

    def anything(self) -> bytes:
        """Replace any value of the manifest by any other."""
        manifest = copy.deepcopy(self.manifest)
        for _ in range(self.rng.choice([1, 1, 1, 2, 3])):
            *path, last = self.rng.choice(list(_paths(manifest))[1:])
            place = manifest
            for key in path:
                place = place[key]
            place[last] = self._value()
        return self._file(manifest=manifest)

    def cell(self) -> bytes:
        """Change values of layers within their type."""
        manifest, rng = copy.deepcopy(self.manifest), self.rng
        rows = manifest["layers"]["rows"]
        for _ in range(rng.choice([1, 1, 2, 3])):
            row = rng.choice(rows)
            at = rng.randrange(len(self.columns))
            row[at] = self._cell(self.columns[at], row[0])
        if rng.random() < 0.15:
            rows.append([rng.choice(["zz", "bn", ""]), *copy.deepcopy(rng.choice(rows))[1:]])
        if rng.random() < 0.1:
            rows.pop(rng.randrange(len(rows)))
        if rng.random() < 0.1:
            rng.shuffle(rows)
        return self._file(manifest=manifest)

    def _cell(self, column: str, layer: str) -> Any:
        rng = self.rng
        if column == "kind":
            return rng.choice(["linear", "conv2d", "conv1d", "embedding", "experts", "foo"])
        if column in ("tie", "activation_tie", "weight_owner", "input_owner"):
            return rng.choice([*self.layers, "nope", "", None, layer])
        if column in ("fixed", "bits"):
            return rng.choice([f"W{rng.choice([1, 2, 3, 4, 5, 8, 32])}A{rng.choice([1, 2, 4, 8, 32])}", None])
        if column == "name":
            return rng.choice([*self.layers, "bn", "", "nope"])
        if column == "weight_shape":
            return rng.choice([[8, 8], [64], [], [8, 8, 1, 1], [8, 0], [0, 8], [10**9, 10**9], [2**62, 4], [5, 8]])
        if column == "activation_signed":
            return rng.choice([True, False, None])
        return rng.choice([0, 1, 2**63 - 1, 10**18, 5])

    def entry(self) -> bytes:
        """Change the header's entry of a tensor, or the length of the payload."""
        header, rng, payload = copy.deepcopy(self.header), self.rng, self.payload
        name, what = rng.choice(self.names), rng.randrange(10)
        entry = header[name]
        if what == 0:
            entry["data_offsets"] = [rng.choice(NUMBERS), rng.choice(NUMBERS)]
        elif what == 1:
            entry["shape"] = [rng.choice(NUMBERS) for _ in range(rng.randint(0, 20))]
        elif what == 2:
            entry["dtype"] = rng.choice([*ITEM_BYTES, "Q4", "", 5, None, "C64"])
        elif what == 3:
            entry["data_offsets"] = list(header[rng.choice(self.names)]["data_offsets"])
        elif what == 4:
            header.pop(name)
        elif what == 5:
            header[rng.choice(TEXTS)] = header.pop(name)
        elif what == 6:
            entry["data_offsets"][0] = -8
        elif what == 7:
            entry["shape"] = [10**9, 10**9, 1]
        elif what == 8:
            entry["extra"] = self._value()
        elif payload:
            payload = (
                payload + rng.randbytes(rng.choice([1, 8, 100])) if rng.random() < 0.5 else payload[: len(payload) // 2]
            )
        return self._file(header, payload)

    def text(self) -> bytes:
        """Change the text of the manifest in ways that no JSON writer would."""
        metadata = {**self.header["__metadata__"], "digest": ZEROS, "payload_sha256": ZEROS}
        text, rng = compact({**self.header, "__metadata__": metadata}), self.rng
        at = rng.randrange(text.index('"manifest"'), len(text))
        if rng.randrange(8) == 0:
            return seal(text[:at] + text[at + rng.randint(1, 50) :], self.payload)
        return seal(text[:at] + rng.choice(TOKENS) + text[at + rng.choice([0, 1, 5]) :], self.payload)

    def values(self) -> bytes:
        """Change bytes of tensors."""
        payload = bytearray(self.payload)
        for _ in range(self.rng.randint(1, 16)):
            payload[self.rng.randrange(len(payload))] = self.rng.choice([0, 255, 127, 128, self.rng.randrange(256)])
        return self._file(payload=bytes(payload))

    def tensors(self) -> bytes:
        """Change bit-widths, owners and dtypes in the manifest together with tensors that fit them."""
        manifest, rng = copy.deepcopy(self.manifest), self.rng
        held = {}
        for name in self.names:
            begin, end = self.header[name]["data_offsets"]
            held[name] = (self.header[name]["dtype"], self.header[name]["shape"], self.payload[begin:end])
        for _ in range(rng.choice([1, 2, 3])):
            row = rng.choice(manifest["layers"]["rows"])
            rng.choice((self._width, self._owner, self._float, self._scale, self._zero, self._dtype, self._tensor))(
                row, held
            )
        header: dict[str, Any] = {"__metadata__": self.header["__metadata__"]}
        payload = b""
        for name, (dtype, shape, value) in sorted(held.items(), key=lambda item: (-ITEM_BYTES[item[1][0]], item[0])):
            size = ITEM_BYTES[dtype] * math.prod(shape)
            if size != len(value):
                value = bytes(min(size, 1000))
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(payload), len(payload) + len(value)]}
            payload += value
        return self._file(header, payload, manifest)

    def _set(self, row: list[Any], column: str, value: Any) -> None:
        row[self.columns.index(column)] = value

    def _width(self, row: list[Any], held: dict[str, Any]) -> None:
        weight, inputs = self.rng.choice([1, 2, 3, 5, 6, 7, 8]), self.rng.choice([1, 2, 3, 4, 8, 32])
        self._set(row, "bits", f"W{weight}A{inputs}")
        name, kind, shape = row[:3]
        if f"{name}.weight_packed" in held and shape:
            words = (
                [-(-math.prod(shape) * weight // 32)] if kind == "conv2d" else [shape[0], -(-shape[-1] * weight // 32)]
            )
            held[f"{name}.weight_packed"] = ("I32", words, self.rng.randbytes(4 * math.prod(words)))
        if inputs == 32:
            held.pop(f"{name}.input_scale", None)
            held.pop(f"{name}.input_zero_point", None)
        else:
            scale = struct.pack("<f", self.rng.choice([0.1, 1e-45, 3e38, 1e-30]))
            held[f"{name}.input_scale"] = ("F32", self.rng.choice([[1], [], [1, 1, 1]]), scale)

    def _owner(self, row: list[Any], held: dict[str, Any]) -> None:
        self._set(row, "weight_owner", self.rng.choice([*self.layers, "nope", row[0]]))
        for part in PARTS:
            held.pop(f"{row[0]}.{part}", None)

    def _float(self, row: list[Any], held: dict[str, Any]) -> None:
        inputs = self.rng.choice(["4", "8", "32"])
        self._set(row, "bits", f"W32A{inputs}")
        for part in (*PARTS, *(("input_scale", "input_zero_point") if inputs == "32" else ())):
            held.pop(f"{row[0]}.{part}", None)
        held[f"{row[0]}.weight"] = ("F32", row[2], self.rng.randbytes(4 * math.prod(row[2])))

    def _scale(self, row: list[Any], held: dict[str, Any]) -> None:
        name = f"{row[0]}.{self.rng.choice(['weight_scale', 'input_scale'])}"
        if name in held:
            dtype, shape, value = held[name]
            of = SCALES[:6] if self.rng.random() < 0.7 else SCALES
            held[name] = (
                dtype,
                shape,
                b"".join(struct.pack("<f", self.rng.choice(of)) for _ in range(len(value) // 4)),
            )
        if self.rng.random() < 0.2 and f"{row[0]}.weight_scale" in held:
            held[f"{row[0]}.weight_scale"] = ("F32", [1], struct.pack("<f", 0.3))

    def _zero(self, row: list[Any], held: dict[str, Any]) -> None:
        if f"{row[0]}.weight_scale" in held:
            shape = held[f"{row[0]}.weight_scale"][1]
            held[f"{row[0]}.weight_zero_point"] = ("I8", shape, self.rng.randbytes(math.prod(shape)))
        if f"{row[0]}.input_scale" in held:
            dtype = self.rng.choice(["I64", "I32", "I8", "U8", "I16", "BOOL", "F32"])
            value = struct.pack("<q", self.rng.choice([0, -1, 1, 2**24, 2**24 + 1, -(2**63)]))
            held[f"{row[0]}.input_zero_point"] = (dtype, [1], value[: ITEM_BYTES[dtype]])

    def _dtype(self, row: list[Any], held: dict[str, Any]) -> None:
        name = self.rng.choice([n for n in held if n.rpartition(".")[2] not in PARTS] or list(held))
        dtype, count = self.rng.choice(list(ITEM_BYTES)), math.prod(held[name][1])
        held[name] = (dtype, held[name][1], bytes(self.rng.randrange(2) for _ in range(count * ITEM_BYTES[dtype])))

    def _tensor(self, row: list[Any], held: dict[str, Any]) -> None:
        name, what = self.rng.choice(list(held)), self.rng.randrange(4)
        dtype, shape, value = held[name]
        if what == 0:
            held.pop(name)
        elif what == 1:
            more = ["zz", "", f"{row[0]}.weight", "a" * 3000, "../x", f"{row[0]}.weight_quantizer.base", row[0]]
            held[self.rng.choice(more)] = ("F32", self.rng.choice([[0], [1], [], [0, 10**9, 10**9]]), b"")
        elif what == 2:
            flat = [len(value) // ITEM_BYTES[dtype]]
            held[name] = (dtype, self.rng.choice([flat, [1] * 8 + shape, shape[::-1], [0]]), value)
        else:
            held[name] = ("F32", [0], b"")


def _paths(tree: Any, path: tuple[Any, ...] = ()) -> Any:
    """Return the paths of keys and indices to all values of a tree, parents first."""
    yield path
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from _paths(value, (*path, key))
