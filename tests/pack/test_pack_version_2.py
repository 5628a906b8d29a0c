"""Groups and zero points in the packed file."""

import random
from dataclasses import replace

import pytest
import second_reader
import torch
from packed_toys import GRAPH_V2, WIDTHS_V2, same, toy

from hub_mpq.core import Indicators, LayerBits, Policy
from hub_mpq.cost.size import layer_nbytes
from hub_mpq.errors import InvalidArgument, PackedFormat, PolicyMismatch
from hub_mpq.pack import (
    PackedTensor,
    empty_packed,
    file_nbytes,
    pack_weight,
    read_indicators,
    read_packed,
    write_indicators,
    write_packed,
)


@pytest.fixture
def file(tmp_path):
    tensors, manifest = toy(WIDTHS_V2, graph=GRAPH_V2)
    path = tmp_path / "model.mpq.safetensors"
    write_packed(path, tensors, manifest)
    return path, tensors, manifest


def test_what_is_written_is_read_and_written_again(file, tmp_path):
    path, tensors, manifest = file
    assert manifest.format_version == 2
    assert b'"format_version":"2"' in path.read_bytes()[:80]
    loaded, found = read_packed(path)
    assert found == manifest
    assert same(loaded, tensors)
    for name, value in tensors.items():
        if isinstance(value, PackedTensor):
            assert loaded[name].bits == manifest.policy.bits[name].of_weight
    write_packed(tmp_path / "again", loaded, found)
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_a_reader_written_from_the_specification_dequantizes_alike(file):
    path, tensors, _ = file
    layers, _ = second_reader.read(path.read_bytes())
    assert set(layers) == {name for name, value in tensors.items() if isinstance(value, PackedTensor)}
    for name, layer in layers.items():
        if "weights" in layer:
            weight = tensors[name].dequantize(torch.float64)
            weight = weight.mT if tensors[name].kind in ("conv1d", "experts_transposed") else weight
            assert [v for row in layer["weights"] for v in row] == weight.reshape(-1).tolist(), name


@pytest.mark.parametrize("seed", range(3))
def test_the_size_is_a_sum_over_layers_whatever_the_groups(file, tmp_path, seed):
    """The header of a file with groups is as long as that of any other; so bytes can be a limit of a search."""
    path, _, manifest = file
    rng = random.Random(seed)
    levels = ["W2g8A32", "W4g16zA32", "W8g8zA32", "W3zA32", "W5A32", "W1g8A32", "W8A32"]
    widths = {n: rng.choice(levels) for n in WIDTHS_V2 if n not in ("stem", "depthwise", "mlp.fc", "head")}
    widths |= {"stem": "W8A8", "depthwise": "W2A4", "mlp.fc": "W6g16A32", "head": widths["emb"]}
    tensors, other = toy(widths, graph=GRAPH_V2)
    size = write_packed(tmp_path / "other", tensors, other)
    assert size == file_nbytes(tensors, other) == (tmp_path / "other").stat().st_size
    empty = {
        name: empty_packed(v.kind, v.weight_shape, v.bits, per_channel=v.weight_scale.numel() > 1)
        if isinstance(v, PackedTensor)
        else v
        for name, v in tensors.items()
    }
    assert file_nbytes(empty, other) == size

    def payload(which):
        return sum(layer_nbytes(x, which.policy.bits[x.name]) for x in GRAPH_V2)

    assert size - payload(other) == path.stat().st_size - payload(manifest)


def test_the_last_group_may_be_short():
    weight = torch.arange(-5, 5)[None]
    scale = torch.tensor([[0.5, 2.0]], dtype=torch.float16)
    packed = pack_weight(weight, scale, "linear", 4, torch.tensor([[-1, 3]]), group_size=8)
    wanted = [(v + 1) * 0.5 for v in range(-5, 3)] + [(v - 3) * 2.0 for v in (3, 4)]
    assert packed.dequantize().tolist() == [wanted]
    assert torch.equal(packed.unpack(), weight)
    assert packed.zero_points().tolist() == [[-1, 3]]
    assert packed.dequantize(rows=torch.tensor([0, 0])).tolist() == [wanted, wanted]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: replace(p, weight_scale=p.weight_scale.float()), "float16 or bfloat16"),
        (lambda p: replace(p, weight_scale=p.weight_scale[:, :1]), r"\(5, 3\)"),
        (lambda p: replace(p, weight_zero_point=p.weight_zero_point[:-1]), "weight_zero_point must be int32"),
        (lambda p: replace(p, group_size=32), r"\(5, 2\)"),
        (lambda p: replace(p, group_size=4), "group size"),
        (lambda p: replace(p, kind="conv2d"), "weight_packed must be"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(change, words):
    value = torch.zeros(5, 37, dtype=torch.int64)
    packed = pack_weight(value, torch.ones(5, 3, dtype=torch.float16), "linear", 4, torch.zeros_like(value[:, :3]), 16)
    with pytest.raises(InvalidArgument, match=words):
        change(packed)


def test_zero_points_must_fit_their_width():
    value = torch.zeros(2, 16, dtype=torch.int64)
    with pytest.raises(InvalidArgument, match="do not fit into 3 bits"):
        pack_weight(value, torch.ones(2, 2, dtype=torch.float16), "linear", 3, torch.tensor([[0, 4], [0, 0]]), 8)


def changed(path, old, new):
    """The file with one stretch of its header replaced by another of its length, and its digest made right."""
    import hashlib

    data = path.read_bytes()
    assert data.count(old) >= 1
    assert len(old) == len(new)
    data = data.replace(old, new)
    size = 8 + int.from_bytes(data[:8], "little")
    at = data.index(b'"digest":"') + 10
    digest = hashlib.sha256(data[:at] + b"0" * 64 + data[at + 64 : size]).hexdigest().encode()
    path.write_bytes(data[:at] + digest + data[at + 64 :])
    return path


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            b'format_version":"2',
            b'format_version":"1',
            "groups and zero points require format version 2, got a file of version 1",
        ),
        (b'format_version":"2', b'format_version":"3', "reads versions 1 to 2"),
        (b"W6g16A32", b"W6g24A32", "weight_scale"),
        (b"W5g8zA32", b"W5g88A32", "weight_scale"),
        (b"W4zA32", b"W4z_32", "is not a valid bit-width level"),
        (b"W3A4", b"W3z4", "is not a valid bit-width level"),
        (b"W3A4", b"W3zA", "is not a valid bit-width level"),
        (b"W1g8A32", b"W1g7A32", "group size"),
    ],
)
def test_a_header_that_lies_is_refused(file, old, new, words):
    with pytest.raises(PackedFormat, match=words):
        read_packed(changed(file[0], old, new))


def test_a_count_that_is_not_that_of_the_shape_is_refused(file):
    """It would be memory that is taken and never filled."""
    path, tensors, manifest = file
    first, *rest = manifest.graph.layers
    graph = replace(manifest.graph, layers=(replace(first, weight_count=2**60), *rest))
    write_packed(path, tensors, replace(manifest, graph=graph))
    with pytest.raises(PackedFormat, match="weight_count does not match"):
        read_packed(path)


def test_a_policy_gives_no_groups_to_convolutions(file):
    bits = {**file[2].policy.bits, "depthwise": LayerBits(3, 4, 32)}
    with pytest.raises(InvalidArgument, match="'depthwise' of kind 'conv2d' does not support"):
        Policy(bits, GRAPH_V2.digest).check(GRAPH_V2)
    with pytest.raises(PolicyMismatch):
        Policy({"x": LayerBits(3, 4)}, GRAPH_V2.digest).check(GRAPH_V2)


def test_scores_of_groups_are_stored(tmp_path):
    rows = {
        "a": {LayerBits(4, 32): 0.5, LayerBits(4, 32, 128): 0.25, LayerBits(4, 32, 128, False): 0.125},
        "b": {LayerBits(1, 32, 32): 2.0, LayerBits(2, 8): 1.0},
        "c": {LayerBits(1, 8): 2.0, LayerBits(2, 8): 1.0},
    }
    found = Indicators({}, {}, {}, {"strategy": "gradient"}, rows)
    write_indicators(tmp_path / "i", found)
    assert read_indicators(tmp_path / "i") == found
    assert b'"format_version":"2"' in (tmp_path / "i").read_bytes()[:80]
    write_indicators(tmp_path / "j", Indicators({}, {}, {}, {}, {"c": rows["c"]}))
    assert b'"format_version":"1"' in (tmp_path / "j").read_bytes()[:80]
