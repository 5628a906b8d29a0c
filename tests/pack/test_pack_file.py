"""The file: round trips, what others see in it, and its size to the byte."""

import hashlib
import random
from dataclasses import fields, replace
from pathlib import Path

import pytest
import second_reader
import torch
from packed_toys import GRAPH, WIDTHS, same, toy
from safetensors import safe_open
from safetensors.torch import load_file

from hub_mpq.core import FloatOp, LayerBits, LayerGraph, LayerSpec, Policy
from hub_mpq.cost.size import layer_nbytes
from hub_mpq.errors import InvalidArgument, PackedFormat, PolicyMismatch
from hub_mpq.pack import (
    Manifest,
    PackedTensor,
    empty_packed,
    file_nbytes,
    header_nbytes,
    parse_manifest,
    read_manifest,
    read_packed,
    write_packed,
)
from hub_mpq.pack.manifest import _FLOAT_TYPES, _LAYER_TYPES, PROVENANCE_RESERVE

GOLDEN = Path(__file__).parent / "golden_v1.mpq.safetensors"


def test_what_is_written_is_read(packed):
    path, tensors, manifest = packed
    loaded, found = read_packed(path)
    assert found == manifest
    assert same(loaded, tensors)
    assert isinstance(loaded["stem"], PackedTensor)
    assert torch.equal(loaded["stem"].dequantize(), tensors["stem"].dequantize())
    assert read_manifest(path) == manifest


def test_writing_what_was_read_gives_the_same_bytes(packed, tmp_path):
    path, _, _ = packed
    loaded, manifest = read_packed(path)
    again = tmp_path / "again"
    write_packed(again, dict(reversed(loaded.items())), manifest)
    assert again.read_bytes() == path.read_bytes()


def test_the_header_alone_gives_the_manifest(packed):
    path, _, manifest = packed
    data = path.read_bytes()
    size = 8 + int.from_bytes(data[:8], "little")
    assert parse_manifest(data[:size], "url") == manifest
    assert parse_manifest(data[: size + 9], "url") == manifest
    with pytest.raises(PackedFormat, match=r"^url: "):
        parse_manifest(data[: size - 1], "url")


def test_safetensors_opens_it(packed):
    path, tensors, _ = packed
    loaded = load_file(path)
    assert torch.equal(loaded["stem.weight_packed"], tensors["stem"].weight_packed)
    assert torch.equal(loaded["half"], tensors["half"])
    assert loaded["mlp.fc.weight_shape"].tolist() == [5, 13]
    with safe_open(path, "pt") as file:
        assert file.metadata()["format"] == "pt"


def test_a_reader_written_from_the_specification_agrees(packed):
    path, tensors, manifest = packed
    layers, text = second_reader.read(path.read_bytes())
    assert set(layers) == {name for name, value in tensors.items() if isinstance(value, PackedTensor)}
    for name, layer in layers.items():
        value = tensors[name].unpack()
        value = value.t() if tensors[name].kind == "conv1d" else value
        assert [v for stream in layer["integers"] for v in stream] == value.reshape(-1).tolist()
        assert list(layer["scale"]) == tensors[name].weight_scale.tolist()
    assert text["provenance"] == manifest.provenance


def test_version_1_stays_readable():
    tensors, manifest = toy()
    loaded, found = read_packed(GOLDEN)
    assert found == manifest
    assert same(loaded, tensors)


def test_version_1_is_still_written_so(packed):
    assert hashlib.sha256(packed[0].read_bytes()).digest() == hashlib.sha256(GOLDEN.read_bytes()).digest()


def test_a_model_that_is_one_layer_has_no_name(tmp_path):
    graph = LayerGraph("one", None, "module", (4,), (LayerSpec("", "linear", (2, 4), 8, 8, 4),))
    tensors, manifest = toy({"": "W4A32"}, graph=graph)
    write_packed(tmp_path / "m", tensors, manifest)
    loaded, _ = read_packed(tmp_path / "m")
    assert torch.equal(loaded[""].dequantize(), tensors[""].dequantize())


def test_reading_gives_tensors_of_their_own(packed):
    path, tensors, _ = packed
    loaded, _ = read_packed(path)
    loaded["bn.weight"].zero_()
    assert loaded["bn.weight"].is_contiguous()
    assert torch.equal(loaded["fc.bias"], tensors["fc.bias"])
    assert same(read_packed(path)[0], tensors)


def test_the_manifest_knows_every_field_of_the_words():
    assert set(_LAYER_TYPES) == {f.name for f in fields(LayerSpec)}
    assert set(_FLOAT_TYPES) == {f.name for f in fields(FloatOp)}


def test_who_reads_an_input_first_is_written_where_it_is_not_the_layer_itself(tmp_path):
    _, manifest = toy()
    assert "input_owner" not in manifest.to_text()
    layers = tuple(replace(x, input_owner="stem" if x.name == "depthwise" else None) for x in GRAPH)
    again = replace(manifest, graph=replace(GRAPH, layers=layers))
    assert again.to_text().count("input_owner") == 1
    assert Manifest.from_text(again.to_text()) == again
    with pytest.raises(InvalidArgument, match="manifest is invalid"):
        Manifest.from_text(again.to_text().replace('"fixed","input_owner"', '"input_owner","fixed"'))


def change(name, value):
    tensors, manifest = toy()
    return {**tensors, name: value}, manifest


def without(name):
    tensors, manifest = toy()
    return {k: v for k, v in tensors.items() if k != name}, manifest


ODD = [
    (change("stem", toy({**WIDTHS, "stem": "W4A8"})[0]["stem"]), "packed as W4A32, but the policy has W8A8"),
    (change("stem", torch.ones(3)), "stem.weight_shape' is missing"),
    (without("mlp.fc"), "mlp.fc.weight_shape' is missing"),
    (without("stem.input_scale"), "stem.input_scale' is missing"),
    (change("stem.input_scale", torch.ones(2)), "one value"),
    (change("stem.input_scale", torch.tensor([float("nan")])), "stem.input_scale': scales must be finite"),
    (change("stem.input_scale", torch.ones(1, dtype=torch.float64)), "scales must be float32"),
    (change("stem.input_zero_point", torch.ones(1)), "a zero point must be an integer"),
    (change("stem.input_zero_point", torch.tensor([2**40])), "must be within"),
    (change("emb.input_scale", torch.ones(1)), "does not quantize the input of 'emb'"),
    (change("no.weight_scale", torch.ones(1)), "does not pack the weight of layer 'no'"),
    (change("head.weight_packed", torch.ones(1)), "does not pack the weight of layer 'head'"),
    (change("stem.weight", torch.ones(1)), "is packed"),
    (change("stem.weight_scale", torch.ones(5)), "occurs twice"),
    (change("z", torch.ones(1, dtype=torch.complex64)), "cannot store"),
    (change("__metadata__", torch.ones(1)), "cannot store"),
    (change("z", torch.ones(1, device="meta")), "meta device"),
    (change("\ud800", torch.ones(1)), "cannot convert to JSON"),
]


@pytest.mark.parametrize(("model", "words"), ODD, ids=[words for _, words in ODD])
def test_what_does_not_belong_together_is_not_written(packed, model, words):
    path, before = packed[0], packed[0].read_bytes()
    with pytest.raises(InvalidArgument, match=words):
        write_packed(path, *model)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_policy_for_another_model_is_not_written(tmp_path):
    tensors, manifest = toy()
    other = replace(manifest, policy=Policy({"x": LayerBits(4, 4)}, GRAPH.digest))
    with pytest.raises(PolicyMismatch, match="unknown layers \\['x'\\]"):
        write_packed(tmp_path / "m", tensors, other)
    with pytest.raises(InvalidArgument, match="cannot convert to JSON"):
        write_packed(tmp_path / "m", tensors, replace(manifest, provenance={"loss": float("nan")}))
    assert not list(tmp_path.iterdir())


def meta(tensors):
    """The same model on the meta device."""
    return {
        name: empty_packed(value.kind, value.weight_shape, value.num_bits, per_channel=value.weight_scale.numel() > 1)
        if isinstance(value, PackedTensor)
        else value.to("meta")
        for name, value in tensors.items()
    }


def test_size_is_known_to_the_byte_and_linear_in_the_layers(tmp_path):
    rng = random.Random(0)
    headers = set()
    for case in range(60):
        widths = {name: f"W{rng.randint(1, 8)}{text[text.index('A') :]}" for name, text in WIDTHS.items()}
        widths["head"] = widths["emb"].partition("A")[0] + "A8"  # they share one weight
        tensors, manifest = toy(widths, seed=case)
        provenance = {"accuracy": rng.random(), "text": "x" * rng.randint(0, 300)}
        manifest = replace(manifest, provenance=provenance)
        written = write_packed(tmp_path / "m", tensors, manifest)
        assert written == (tmp_path / "m").stat().st_size == file_nbytes(meta(tensors), manifest)
        layers = sum(
            layer_nbytes(
                layer,
                manifest.policy.bits[layer.name],
                per_channel=layer.name != "depthwise",
                input_zero_point=layer.name == "depthwise",
            )
            for layer in GRAPH
        )
        taken = (".input_scale", ".input_zero_point")
        plain = {k: v for k, v in tensors.items() if isinstance(v, torch.Tensor) and not k.endswith(taken)}
        header = header_nbytes(tensors, manifest)
        headers.add(header)
        assert written == header + layers + sum(v.numel() * v.element_size() for v in plain.values())
    assert len(headers) == 1


def test_offsets_of_more_digits_do_not_change_the_header():
    """Widths move offsets over powers of ten; the header must not see it."""
    layers = tuple(LayerSpec(f"l{i}", "conv2d", (11, 3, 3, 3), 1, 297, 1) for i in range(40))
    graph = LayerGraph("m", None, "timm", (3,), layers)
    sizes = set()
    for bits in range(1, 9):
        policy = Policy.uniform(graph, f"W{bits}")
        tensors = {layer.name: empty_packed("conv2d", layer.weight_shape, bits) for layer in layers}
        manifest = replace(toy()[1], graph=graph, policy=policy)
        sizes.add(header_nbytes(tensors, manifest))
        assert file_nbytes(tensors, manifest) - header_nbytes(tensors, manifest) == sum(
            layer_nbytes(layer, policy.bits[layer.name]) for layer in layers
        )
    assert len(sizes) == 1


def test_a_long_provenance_is_counted(tmp_path):
    tensors, manifest = toy()
    long = replace(manifest, provenance={"log": '"' * PROVENANCE_RESERVE})
    assert write_packed(tmp_path / "m", tensors, long) == file_nbytes(tensors, long)
    assert file_nbytes(tensors, long) > file_nbytes(tensors, manifest)
    assert read_manifest(tmp_path / "m") == long


def test_float_and_shared_layers_cost_what_they_store():
    linear = LayerSpec("l", "linear", (5, 7), 35, 35, 7)
    assert layer_nbytes(linear, LayerBits(32, 32)) == 4 * 35
    assert layer_nbytes(linear, LayerBits(3, 32)) == 5 * 4 + 5 * 4 + 2 * 8
    assert layer_nbytes(linear, LayerBits(3, 8), per_channel=False, input_zero_point=True) == 5 * 4 + 4 + 2 * 8 + 8
    assert layer_nbytes(replace(linear, weight_owner="e"), LayerBits(3, 8)) == 4


@pytest.mark.parametrize(("name", "most"), [("resnet18", 1.01), ("mobilenetv2_100", 1.02)])
def test_a_real_network_at_four_bits_is_within_two_percent(name, most):
    import timm

    with torch.device("meta"):
        model = timm.create_model(name)
    modules = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)}
    layers = [
        LayerSpec(
            n, "linear" if m.weight.dim() == 2 else "conv2d", tuple(m.weight.shape), 10**8, m.weight.numel(), 10**6
        )
        for n, m in modules.items()
    ]
    for end in (0, -1):
        layers[end] = replace(layers[end], fixed=LayerBits(8, 8))
    graph = LayerGraph(name, "0" * 40, "timm", (3, 224, 224), tuple(layers))
    policy = Policy.uniform(graph, "W4A4")
    tensors = {k: v for k, v in model.state_dict().items() if k.removesuffix(".weight") not in modules}
    ideal = sum(v.numel() * v.element_size() for v in tensors.values())
    for layer in layers:
        bits = policy.bits[layer.name].weight
        tensors[layer.name] = empty_packed(layer.kind, layer.weight_shape, bits)
        tensors[f"{layer.name}.input_scale"] = torch.ones(1)
        ideal += -(-layer.weight_count * bits // 8) + 4 * layer.weight_shape[0] + 4
    manifest = replace(toy()[1], graph=graph, policy=policy)
    assert file_nbytes(tensors, manifest) <= most * ideal


def test_sharing_and_views_are_stored_each_whole(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    tensors, manifest = toy()
    tensors |= {"a": base.t(), "b": base[:, 1], "c": base, "d": torch.nn.Parameter(base)}
    write_packed(tmp_path / "m", tensors, manifest)
    loaded, _ = read_packed(tmp_path / "m")
    assert all(torch.equal(loaded[k], tensors[k]) for k in "abcd")


def test_every_dtype_returns_and_lies_aligned(tmp_path):
    tensors, manifest = toy()
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
    dtypes += [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
    for dtype in dtypes:
        tensors |= {
            f"{dtype}.odd": torch.tensor([1.0, 0.0, 1.0]).to(dtype),
            f"{dtype}.none": torch.empty(0, 3, dtype=dtype),
        }
    write_packed(tmp_path / "m", tensors, manifest)
    loaded, _ = read_packed(tmp_path / "m")
    for name, value in tensors.items():
        if isinstance(value, torch.Tensor):
            assert loaded[name].dtype == value.dtype
            assert loaded[name].shape == value.shape
            assert torch.equal(loaded[name].reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8))
            assert loaded[name].data_ptr() % value.element_size() == 0
