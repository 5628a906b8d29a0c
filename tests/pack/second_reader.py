"""A reader written from FORMAT.md alone, with the standard library: no torch, no line of hub_mpq."""

import hashlib
import json
import re
import struct


def read(data):
    """{layer: {"bits", "integers" (one list per stream), "scale", "weights" (one list per row)}} and the manifest."""
    (size,) = struct.unpack_from("<Q", data)
    header, payload = data[8 : 8 + size], data[8 + size :]
    tree = json.loads(header)
    meta = tree.pop("__metadata__")
    assert meta["format_version"] in ("1", "2")
    assert meta["content"] == "mpq-weights"
    assert hashlib.sha256(payload).hexdigest() == meta["payload_sha256"]
    at = 8 + header.index(b'"digest":"') + 10
    assert hashlib.sha256(data[:at] + b"0" * 64 + data[at + 64 : 8 + size]).hexdigest() == meta["digest"]
    manifest = json.loads(meta["manifest"])
    tensors = {}
    for name, row in tree.items():
        begin, end = row["data_offsets"]
        form = {"I32": "I", "F32": "f", "I64": "q", "F16": "e", "BF16": "H"}.get(row["dtype"])
        if form:
            values = struct.unpack(f"<{(end - begin) // struct.calcsize(form)}{form}", payload[begin:end])
            if row["dtype"] == "BF16":
                values = [struct.unpack("<f", struct.pack("<I", v << 16))[0] for v in values]
            tensors[name] = values
    layers = {}
    for row in manifest["layers"]["rows"]:
        layer = dict(zip(manifest["layers"]["columns"], row, strict=True))
        bits, group, zeros = re.fullmatch(r"W(\d+)(?:g(\d+))?(z?)A\d+", layer["bits"]).groups()
        bits, group, name = int(bits), int(group or 0), layer["name"]
        assert meta["format_version"] == "2" or not (group or zeros)
        if bits == 32 or layer["weight_owner"] is not None:
            continue
        shape = tensors[f"{name}.weight_shape"]
        assert list(shape) == layer["weight_shape"]
        kinds = {"conv2d": (1, layer["weight_count"]), "conv1d": shape[::-1]}
        if len(shape) == 3:
            kinds["experts"] = shape[0] * shape[1], shape[2]
            kinds["experts_transposed"] = shape[0] * shape[2], shape[1]
        rows, cols = kinds.get(layer["kind"], shape)
        words = tensors[f"{name}.weight_packed"]
        per_row = len(words) // rows
        streams = []
        for r in range(rows):
            stream = sum(word << (32 * i) for i, word in enumerate(words[r * per_row : (r + 1) * per_row]))
            codes = [(stream >> (bits * k)) % 2**bits for k in range(cols)]
            streams.append([2 * c - 1 if bits == 1 else c - 2 ** (bits - 1) for c in codes])
        scale = tensors[f"{name}.weight_scale"]
        layers[name] = {"bits": bits, "integers": streams, "scale": scale}
        if layer["kind"] == "conv2d":
            continue
        groups = -(-cols // group) if group else 1
        zero = [0] * (rows * groups)
        if zeros:
            stream = sum(word << (32 * i) for i, word in enumerate(tensors[f"{name}.weight_zero_point"]))
            zero = [(stream >> (bits * k)) % 2**bits - 2 ** (bits - 1) for k in range(rows * groups)]
        at = [[r * groups + (c // group if group else 0) for c in range(cols)] for r in range(rows)]
        layers[name]["weights"] = [
            [(v - zero[i]) * scale[i if len(scale) > 1 else 0] for v, i in zip(*pair, strict=True)]
            for pair in zip(streams, at, strict=True)
        ]
    return layers, manifest
