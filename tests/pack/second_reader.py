"""A reader written from the README alone, with the standard library: no torch, no line of hub_mpq."""

import hashlib
import json
import struct


def read(data):
    """{layer: {"bits", "integers" (one list per stream), "scale"}} and the manifest of a packed file."""
    (size,) = struct.unpack_from("<Q", data)
    header, payload = data[8 : 8 + size], data[8 + size :]
    tree = json.loads(header)
    meta = tree.pop("__metadata__")
    assert (meta["format_version"], meta["content"]) == ("1", "mpq-weights")
    assert hashlib.sha256(payload).hexdigest() == meta["payload_sha256"]
    at = 8 + header.index(b'"digest":"') + 10
    assert hashlib.sha256(data[:at] + b"0" * 64 + data[at + 64 : 8 + size]).hexdigest() == meta["digest"]
    manifest = json.loads(meta["manifest"])
    tensors = {}
    for name, row in tree.items():
        begin, end = row["data_offsets"]
        form = {"I32": "I", "F32": "f", "I64": "q"}.get(row["dtype"])
        if form:
            tensors[name] = struct.unpack(f"<{(end - begin) // struct.calcsize(form)}{form}", payload[begin:end])
    layers = {}
    for row in manifest["layers"]["rows"]:
        layer = dict(zip(manifest["layers"]["columns"], row, strict=True))
        bits, name = int(layer["bits"][1 : layer["bits"].index("A")]), layer["name"]
        if bits == 32 or layer["weight_owner"] is not None:
            continue
        shape = tensors[f"{name}.weight_shape"]
        assert list(shape) == layer["weight_shape"]
        rows, cols = {"conv2d": (1, layer["weight_count"]), "conv1d": shape[::-1]}.get(layer["kind"], shape)
        words = tensors[f"{name}.weight_packed"]
        per_row = len(words) // rows
        streams = []
        for r in range(rows):
            stream = sum(word << (32 * i) for i, word in enumerate(words[r * per_row : (r + 1) * per_row]))
            codes = [(stream >> (bits * k)) % 2**bits for k in range(cols)]
            streams.append([2 * c - 1 if bits == 1 else c - 2 ** (bits - 1) for c in codes])
        layers[name] = {"bits": bits, "integers": streams, "scale": tensors[f"{name}.weight_scale"]}
    return layers, manifest
