"""20,000 seeded mutations: refused, never a crash, a hang or another model."""

import random

import pytest
from forge import overwrite, seal, split, text_of
from packed_toys import same

from hub_mpq.core import Indicators
from hub_mpq.errors import PackedFormat
from hub_mpq.pack import PackedTensor, read_indicators, read_packed, write_indicators

COUNT = 20_000
TOKENS = [
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"0",
    b"-1",
    b"9" * 20,
    b"NaN",
    b"null",
    b"1e5",
    b" ",
    b"\0",
    b"\xff",
]


def mutate(data, rng):
    """One to four random edits: flips, cuts, copies, insertions, JSON tokens, numbers."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        length = rng.choice([1, 2, 8, 64, 500])
        what = rng.randrange(7)
        if what == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif what == 1:
            del data[at : at + length]
        elif what == 2:
            data[at:at] = data[at : at + length]
        elif what == 3:
            data[at:at] = rng.choice(TOKENS)
        elif what == 4:
            data[at : at + length] = rng.randbytes(length)
        elif what == 5:
            data[at:] = b""
        else:
            data[:8] = rng.choice([rng.getrandbits(64), rng.randrange(2 * len(data) + 1)]).to_bytes(8, "little")
        if not data:
            return b""
    return bytes(data)


def use(tensors):
    """Do with a loaded model what a load does."""
    for value in tensors.values():
        (value.dequantize() if isinstance(value, PackedTensor) else value.float()).sum()


def test_mutated_files_are_refused(packed):
    path = packed[0]
    data, rng = path.read_bytes(), random.Random(1)
    for _ in range(COUNT // 2):
        mutant = mutate(data, rng)
        if mutant == data:
            continue
        overwrite(path, mutant)
        with pytest.raises(PackedFormat):
            read_packed(path)


def test_mutated_headers_with_right_digests_are_refused_or_hold_what_they_say(packed):
    """Whoever can compute the digests can write another model, but not one that breaks the reader."""
    path, tensors, manifest = packed
    header, payload = split(path.read_bytes())
    text, rng, loaded = text_of(header), random.Random(2), 0
    start = text.index('"manifest"')
    for _ in range(COUNT // 4):
        head = text[:start].encode() + mutate(text[start:].encode(), rng)
        body = mutate(payload, rng) if rng.random() < 0.3 else payload
        overwrite(path, seal(head, body))
        try:
            found, said = read_packed(path)
        except PackedFormat:
            continue
        use(found)
        loaded += 1
        said.policy.check(said.graph)
        if body == payload and said == manifest and found.keys() == tensors.keys():
            assert same(found, tensors)
    assert loaded < COUNT / 8


def test_mutated_payloads_with_right_digests_load_or_are_refused(packed):
    path = packed[0]
    header, payload = split(path.read_bytes())
    rng, loaded, named = random.Random(3), 0, 0
    for _ in range(COUNT // 8):
        body = bytearray(payload)
        for _ in range(rng.randint(1, 20)):
            body[rng.randrange(len(body))] = rng.randrange(256)
        overwrite(path, seal(header, bytes(body)))
        try:
            found, _ = read_packed(path)
        except PackedFormat as error:
            named += "tensor '" in str(error)
            continue
        loaded += 1
        use(found)
        assert all(bool((v.weight_scale > 0).all()) for v in found.values() if isinstance(v, PackedTensor))
    assert loaded
    assert named == COUNT // 8 - loaded


def test_mutated_indicators_are_refused(tmp_path):
    path = tmp_path / "indicators.safetensors"
    write_indicators(path, Indicators({"a": {2: 0.5, 8: 0.25}}, {"a": {2: 1.5}}, {"a": True}))
    data, rng = path.read_bytes(), random.Random(4)
    for _ in range(COUNT // 8):
        mutant = mutate(data, rng)
        if mutant != data:
            overwrite(path, mutant)
            with pytest.raises(PackedFormat):
                read_indicators(path)
