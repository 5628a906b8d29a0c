"""Files that are torn, flipped, or made to deceive are refused in words."""

import json
import math
import os
import struct
import subprocess
import sys

import pytest
import torch
from forge import seal, split, text_of
from safetensors.torch import save_file

from hub_mpq.errors import PackedFormat
from hub_mpq.pack import read_indicators, read_manifest, read_packed, write_packed


def refused(path, data, match=None):
    path.write_bytes(data)
    with pytest.raises(PackedFormat, match=match) as caught:
        read_packed(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_every_flipped_bit_is_refused(packed):
    path = packed[0]
    data = path.read_bytes()
    with open(path, "r+b", buffering=0) as file:
        for at, byte in enumerate(data):
            for bit in range(8):
                os.pwrite(file.fileno(), bytes([byte ^ 1 << bit]), at)
                with pytest.raises(PackedFormat):
                    read_packed(path)
            os.pwrite(file.fileno(), data[at : at + 1], at)
    read_packed(path)


def test_every_truncation_and_every_addition_is_refused(packed):
    path = packed[0]
    data = path.read_bytes()
    for size in reversed(range(len(data))):
        os.truncate(path, size)
        with pytest.raises(PackedFormat):
            read_packed(path)
    for more in (b"\0", b" ", data):
        refused(path, data + more, "too long")


def test_the_header_alone_is_verified(packed):
    path = packed[0]
    data = path.read_bytes()
    at = data.index(b"W3A4")
    path.write_bytes(data[:at] + b"W2A4" + data[at + 4 :])
    with pytest.raises(PackedFormat, match="does not match its digest"):
        read_manifest(path)


def test_a_claim_of_a_terabyte_costs_nothing(packed):
    header, payload = split(packed[0].read_bytes())
    refused(packed[0], (10**12).to_bytes(8, "little") + b"{" * 192, "claims 1000000000000 bytes")
    refused(packed[0], (2**64 - 1).to_bytes(8, "little") + b"{" * 192, "claims")
    header["bn.weight"] |= {"shape": [2**40], "data_offsets": [0, 2**42]}
    refused(packed[0], seal(header, payload))


def test_other_files_are_named_for_what_they_are(packed, tmp_path):
    path, tensors, _ = packed
    data = path.read_bytes()
    refused(tmp_path / "empty", b"", "truncated")
    refused(tmp_path / "zeros", bytes(1000), "not a hub_mpq file")
    refused(tmp_path / "pickle", b"\x80\x04\x95" + bytes(500), "claims")
    save_file({"a": torch.ones(3)}, tmp_path / "plain")
    with pytest.raises(PackedFormat, match="not a hub_mpq file"):
        read_packed(tmp_path / "plain")
    with pytest.raises(PackedFormat, match="expected content mpq-indicators, got mpq-weights"):
        read_indicators(path)
    refused(tmp_path / "version", data.replace(b'format_version":"1"', b'format_version":"7"'), "format version 7")
    with pytest.raises(OSError, match="directory"):
        read_packed(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_packed(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(PackedFormat, match="expected a regular file"):
        read_packed(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(path)
    path.write_bytes(data)
    assert set(read_packed(tmp_path / "link")[0]) == set(tensors)


def entry(name, **change):
    """Edit a tensor's entry."""

    def edit(header, payload):
        header[name] |= change
        return header, payload

    return edit


def values(name, form, *numbers):
    """Overwrite the first values of a tensor."""

    def edit(header, payload):
        at, raw = header[name]["data_offsets"][0], struct.pack(f"<{len(numbers)}{form}", *numbers)
        return header, payload[:at] + raw + payload[at + len(raw) :]

    return edit


def metadata(**change):
    def edit(header, payload):
        header["__metadata__"] |= change
        return header, payload

    return edit


def manifest(change):
    """Edit the manifest's object in place; a returned text replaces it."""

    def edit(header, payload):
        tree = json.loads(header["__metadata__"]["manifest"])
        text = change(tree)
        header["__metadata__"]["manifest"] = text if isinstance(text, str) else json.dumps(tree)
        return header, payload

    return edit


def cell(layer, column, value):
    """Edit one cell of the manifest's table of layers."""

    def change(tree):
        table = tree["layers"]
        row = next(row for row in table["rows"] if row[table["columns"].index("name")] == layer)
        row[table["columns"].index(column)] = value

    return manifest(change)


def text(old, new):
    """Edit the header's text."""

    def edit(header, payload):
        whole = text_of(header)
        assert old in whole
        return whole.replace(old, new, 1), payload

    return edit


def drop(name):
    def edit(header, payload):
        begin, end = header[name]["data_offsets"]
        out = {}
        for key, row in header.items():
            if key != "__metadata__" and row["data_offsets"][0] >= end:
                row = {**row, "data_offsets": [at - (end - begin) for at in row["data_offsets"]]}
            if key != name:
                out[key] = row
        return out, payload[:begin] + payload[end:]

    return edit


def reverse(header, payload):
    return dict([next(iter(header.items())), *reversed(list(header.items())[1:])]), payload


NAN, INF = math.nan, math.inf
LIES = {
    "nan scale": (values("stem.weight_scale", "f", 1, NAN), "'stem.weight_scale': scales must be finite"),
    "infinite scale": (values("mlp.fc.weight_scale", "f", INF), "'mlp.fc.weight_scale': scales must be finite"),
    "zero scale": (values("mlp.fc.weight_scale", "f", 0), "'mlp.fc.weight_scale': scales must be finite"),
    "negative scale": (values("emb.weight_scale", "f", -1), "'emb.weight_scale': scales must be finite"),
    "negative input scale": (values("stem.input_scale", "f", -1), "'stem.input_scale': scales must be finite"),
    "other weight shape": (values("mlp.fc.weight_shape", "q", 13, 5), "'mlp.fc.weight_shape'"),
    "bool of 2": (values("mask", "B", 2), "'mask': BOOL values must be 0 or 1"),
    "other width": (cell("mlp.fc", "bits", "W4A2"), "'mlp.fc.weight_packed'.*at the policy's 4 bits"),
    "float width": (cell("mlp.fc", "bits", "W32A2"), "does not pack the weight of layer 'mlp.fc'"),
    "float input": (cell("stem", "bits", "W8A32"), "does not quantize the input of 'stem'"),
    "no such width": (cell("stem", "bits", "W9A8"), "from 1 to 8"),
    "width as number": (cell("stem", "bits", 8), "expected a string"),
    "unknown kind": (cell("stem", "kind", "conv9d"), "unknown kind|graph_digest"),
    "other shape": (cell("stem", "weight_shape", [3, 5, 3, 3]), "graph_digest does not match"),
    "negative shape": (cell("stem", "weight_shape", [-5, 3, 3, 3]), "non-negative integer"),
    "float macs": (cell("stem", "macs", 1.5), "non-negative integer"),
    "giant macs": (cell("stem", "macs", 2**70), "non-negative integer"),
    "text sign": (cell("stem", "activation_signed", "yes"), "true or false"),
    "number for a name": (cell("stem", "name", 3), "expected a string"),
    "two layers of one name": (cell("stem", "name", "depthwise"), "duplicate layer"),
    "foreign owner": (cell("emb", "weight_owner", "stem"), "cannot share the weight of 'stem'"),
    "short row": (manifest(lambda tree: tree["layers"]["rows"][0].pop() and None), "one value per column"),
    "column twice": (manifest(lambda t: t["layers"]["columns"].__setitem__(1, "name")), "must be unique"),
    "columns as numbers": (manifest(lambda t: t["layers"].update(columns=[1], rows=[[1]])), "expected a string"),
    "no table": (manifest(lambda t: t.update(layers={"rows": []})), "manifest"),
    "unknown key": (manifest(lambda t: t.update(extra=1)), "keys"),
    "missing key": (manifest(lambda t: t.pop("floats") and None), "keys"),
    "list": (manifest(lambda t: "[1,2]"), "expected an object"),
    "no json": (manifest(lambda t: "{"), "not valid JSON"),
    "nan in json": (manifest(lambda t: '{"a":NaN}'), "NaN"),
    "infinite number": (manifest(lambda t: '{"a":1e999}'), "out of range"),
    "digits without end": (manifest(lambda t: '{"a":' + "9" * 100_000 + "}"), "not valid JSON"),
    "deep": (manifest(lambda t: "[" * 100_000), "not valid JSON"),
    "key twice in manifest": (manifest(lambda t: '{"a":1,"a":2}'), "duplicate key 'a'"),
    "manifest no text": (metadata(manifest=3), "metadata"),
    "more metadata": (metadata(extra="x"), "metadata"),
    "name twice": (text('"bn.weight":', '"half":'), "duplicate key 'half'"),
    "metadata twice": (text('"bn.weight":', '"__metadata__":'), "duplicate key"),
    "space": (text('"bn.weight":', '"bn.weight": '), "canonical form"),
    "escape": (text('"bn.weight":', '"bn.wei\\u0067ht":'), "canonical form"),
    "surrogate": (text('"bn.weight":', '"\\ud800":'), "cannot convert to JSON|canonical form"),
    "no utf-8": (text('"bn.weight":', '"\ud800":'), "not valid JSON"),
    "deep header": (text('"bn.weight":', '"a":' + "[" * 50_000), "not valid JSON"),
    "overlap": (entry("bn.weight", data_offsets=[0, 28]), "overlap, gap"),
    "hole": (entry("bn.weight", data_offsets=[8, 36]), "bn.weight"),
    "negative": (entry("bn.weight", data_offsets=[-1, 27]), "invalid data_offsets"),
    "true": (entry("bn.weight", data_offsets=[False, True]), "invalid data_offsets"),
    "three": (entry("bn.weight", data_offsets=[0, 1, 2]), "invalid data_offsets"),
    "null": (entry("bn.weight", data_offsets=None), "invalid data_offsets"),
    "other dtype": (
        entry("stem.weight_packed", dtype="F32"),
        "'stem.weight_packed': expected torch.int32 .* got torch.float32",
    ),
    "unknown dtype": (entry("bn.weight", dtype="F12"), "unknown dtype"),
    "dtype no text": (entry("bn.weight", dtype=[1]), "unknown dtype"),
    "wrong count": (entry("bn.weight", shape=[8]), "overlap, gap"),
    "huge": (entry("bn.weight", shape=[2**62, 4]), "invalid shape"),
    "huge and empty": (entry("none", shape=[0, 2**62, 2**62]), "invalid shape"),
    "many axes": (entry("bn.weight", shape=[1] * 100 + [7]), "invalid shape"),
    "float axis": (entry("bn.weight", shape=[7.0]), "invalid shape"),
    "extra key": (entry("bn.weight", x=1), "expected dtype, shape"),
    "entry no object": (text('"bn.weight":{', '"a":1,"bn.weight":{'), "expected dtype, shape"),
    "other order": (reverse, "overlap, gap"),
    "no scale": (drop("stem.weight_scale"), "'stem.weight_scale' is missing"),
    "no words": (drop("mlp.fc.weight_packed"), "'mlp.fc.weight_packed' is missing"),
    "no input scale": (drop("stem.input_scale"), "'stem.input_scale' is missing"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_with_right_digests_are_refused(packed, lie):
    edit, words = LIES[lie]
    path = packed[0]
    header, payload = split(path.read_bytes())
    refused(path, seal(*edit(header, payload)), words)


def test_the_forger_is_able_to_forge(packed):
    """Without a lie the sealed file loads: so what the test above refuses is the lie, not the seal."""
    path = packed[0]
    path.write_bytes(seal(*split(path.read_bytes())))
    read_packed(path)
    header, payload = split(path.read_bytes())
    path.write_bytes(seal(*drop("bn.steps")(header, payload)))
    assert "bn.steps" not in read_packed(path)[0]


MEMORY = """
import resource, sys
from hub_mpq.errors import PackedFormat
from hub_mpq.pack import read_packed
path, small, big = sys.argv[1], sys.argv[2], int(sys.argv[3])
read_packed(small)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
kept = read_packed(path)
loaded = peak() - before
del kept
data = bytearray(open(path, 'rb').read(4096))
for at in (0, 3, 40, 300, 2000, big // 2, big - 1):
    with open(path, 'r+b') as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 16]))
        file.flush()
        try:
            read_packed(path)
            raise SystemExit(f'flip at {at} was not seen')
        except PackedFormat:
            pass
        file.seek(at)
        file.write(byte)
print(loaded, peak() - before)
"""


def test_memory_stays_within_twice_the_file(packed, tmp_path):
    path, tensors, manifest = packed
    big = tmp_path / "big"
    size = write_packed(big, {**tensors, "blob": torch.ones(12 * 2**20)}, manifest)
    call = [sys.executable, "-c", MEMORY, str(big), str(path), str(size)]
    loaded, all_together = map(int, subprocess.run(call, check=True, capture_output=True, text=True).stdout.split())
    assert loaded < 1.5 * size
    assert all_together < 2 * size
