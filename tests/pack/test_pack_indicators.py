"""Indicators on disk."""

import math
import struct

import pytest
from forge import seal, split
from safetensors.torch import load_file

from hub_mpq.core import Indicators
from hub_mpq.errors import InvalidArgument, PackedFormat
from hub_mpq.pack import read_indicators, read_packed, write_indicators

GIVEN = Indicators(
    {"layer.0": {2: 0.1 + 0.2, 3: 1e-9, 8: 7.0}, "emb/odd": {1: 0.5}},
    {"layer.0": {2: 1 / 3}},
    {"layer.0": True},
    {"strategy": "limpq", "steps": 120, "moved": 0.25, "note": "é"},
)


@pytest.fixture
def path(tmp_path):
    write_indicators(tmp_path / "indicators.safetensors", GIVEN)
    return tmp_path / "indicators.safetensors"


def test_round_trip_is_exact(path):
    assert read_indicators(path) == GIVEN
    assert load_file(path)["weight/layer.0"].tolist() == [[2, 0.1 + 0.2], [3, 1e-9], [8, 7.0]]
    with pytest.raises(PackedFormat, match="expected content mpq-weights, got mpq-indicators"):
        read_packed(path)


def test_an_empty_row_and_nothing_at_all(tmp_path):
    for given in (Indicators({"a": {}}, {}), Indicators({}, {})):
        write_indicators(tmp_path / "i", given)
        assert read_indicators(tmp_path / "i") == given


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (Indicators({"a": {2: 0.0}}, {}), "finite and positive"),
        (Indicators({"a": {2: math.nan}}, {}), "finite"),
        (Indicators({"a": {9: 1.0}}, {}), "from 1 to 8"),
        (Indicators({}, {}, {"a": 1}), "true or false"),
        (Indicators({}, {}, {}, {"x": {1, 2}}), "cannot convert to JSON"),
    ],
)
def test_bad_indicators_are_not_written(path, bad, words):
    before = path.read_bytes()
    with pytest.raises(InvalidArgument, match=words):
        write_indicators(path, bad)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ((2.0, -1.0), "finite and positive"),
        ((2.0, math.inf), "finite"),
        ((2.5, 1.0), "integer"),
        ((9.0, 1.0), "from 1 to 8"),
        ((3.0, 1.0), "ascend"),
    ],
)
def test_lies_with_right_digests_are_refused(path, rows, words):
    header, payload = split(path.read_bytes())
    at = header["weight/layer.0"]["data_offsets"][0]
    path.write_bytes(seal(header, payload[:at] + struct.pack("<2d", *rows) + payload[at + 16 :]))
    with pytest.raises(PackedFormat, match=words):
        read_indicators(path)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("weight/layer.0", "height/layer.0", "expected weight/"),
        ("weight/layer.0", "weight", "expected weight/"),
        ("F64", "I64", "rows of"),
    ],
)
def test_lies_in_the_header_are_refused(path, old, new, words):
    header, payload = split(path.read_bytes())
    moved = {name.replace(old, new): row for name, row in header.items()}
    for row in list(moved.values())[1:]:
        row["dtype"] = row["dtype"].replace(old, new)
    path.write_bytes(seal(moved, payload))
    with pytest.raises(PackedFormat, match=words):
        read_indicators(path)


@pytest.mark.parametrize("manifest", ["[]", "{}", '{"activation_signed":{"a":1},"provenance":{}}', "{"])
def test_lies_in_the_manifest_are_refused(path, manifest):
    header, payload = split(path.read_bytes())
    header["__metadata__"]["manifest"] = manifest
    path.write_bytes(seal(header, payload))
    with pytest.raises(PackedFormat):
        read_indicators(path)
