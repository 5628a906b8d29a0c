"""compressed-tensors: plain transformers with that package computes exactly what we compute."""

from __future__ import annotations

import json
import re
import warnings

import pytest
import torch
import transformers
from plugin_toys import IDS, SMALL, TEXT, build, pack, python
from safetensors.torch import load_file, save_file

from hub_mpq import HubMPQ, LayerBits, Policy
from hub_mpq.core.files import PACKED
from hub_mpq.errors import HubMPQError, InvalidArgument
from hub_mpq.export import FORMATS, llm_compressor_recipe
from hub_mpq.export.compressed_tensors import scheme_of
from hub_mpq.hub.card import CardFacts, render_card

PLAIN = """
import json, sys
import torch, transformers
from safetensors.torch import load_file
transformers.utils.logging.set_verbosity_error()
for row in json.loads(sys.argv[1]):
    model = getattr(transformers, row["cls"]).from_pretrained(row["folder"])
    with torch.no_grad():
        torch.save(model(**load_file(row["inputs"]))[0], row["folder"] + "/logits")
assert not [m for m in sys.modules if m.startswith("hub_mpq")]
"""


def mixed(graph):
    """Every width from 1 to 8, layer by layer."""
    own = [layer.name for layer in graph if layer.weight_owner is None]
    bits = {name: LayerBits(1 + k % 8, 32) for k, name in enumerate(own)}
    bits |= {layer.name: bits[layer.weight_owner] for layer in graph if layer.weight_owner}
    return Policy(bits, graph.digest)


def test_logits_of_all_widths_are_equal_in_plain_transformers(tmp_path):
    rows, want = [], []
    for kind in ("bert", "llama", "classifier"):
        model, inputs = build(kind)
        model.save_pretrained(tmp_path / kind / "float")
        mpq = HubMPQ.from_pretrained(tmp_path / kind / "float")
        mpq.apply_policy(mixed(mpq.graph))
        folder = tmp_path / kind / "exported"
        with (
            pytest.warns(UserWarning, match="vLLM"),
            pytest.warns(UserWarning, match="1-bit weights are stored at 2 bits"),
        ):
            size = mpq.export(folder, "compressed-tensors")
        assert size == (folder / "model.safetensors").stat().st_size
        save_file(inputs, tmp_path / kind / "inputs")
        want.append((folder / "logits", mpq(**inputs)[0].detach()))
        row = {"cls": type(model).__name__, "folder": str(folder), "inputs": str(tmp_path / kind / "inputs")}
        rows.append(row)
        groups = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]
        widths = {group["weights"]["num_bits"] for group in groups.values()}
        assert widths == {2, 3, 4, 5, 6, 7, 8}, "one group per width; 1 bit is stored at 2"
    python(PLAIN, json.dumps(rows))
    for file, logits in want:
        assert torch.equal(torch.load(file), logits)


FORMS = ["W2g32z", "W3g64", "W4g32", "W4z", "W5g64z", "W6g32z", "W7", "W8g32z"]


def in_groups(folder, target=None):
    """(model, inputs, its HubMPQ with widths, groups and zero points by layer, or by tie where the target has them)."""
    model, inputs = build("llama", hidden_size=64, intermediate_size=192)
    model.save_pretrained(folder)
    mpq = HubMPQ.from_pretrained(folder, target=target, weight_only=True)
    first = {}
    bits = {layer.name: layer.fixed for layer in mpq.graph if layer.fixed}
    for k, layer in enumerate(mpq.graph.searched):
        level = LayerBits.parse(FORMS[k % len(FORMS)])
        bits[layer.name] = level if target is None else first.setdefault(layer.activation_tie or layer.name, level)
    return model, inputs, mpq.apply_policy(Policy(bits, mpq.graph.digest), [inputs])


def test_logits_of_groups_and_zero_points_are_equal_in_plain_transformers(tmp_path):
    model, inputs, mpq = in_groups(tmp_path / "float")
    with (
        pytest.warns(UserWarning, match="stored for transformers"),
        pytest.warns(UserWarning, match="different bit-widths or g"),
    ):
        mpq.export(tmp_path / "out", "compressed-tensors")
    groups = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["config_groups"]
    found = [group["weights"] for group in groups.values()]
    wanted = {(b.weight, b.group_size, b.symmetric) for b in map(LayerBits.parse, FORMS)}
    assert {(w["num_bits"], w.get("group_size"), w["symmetric"]) for w in found} == wanted
    save_file(inputs, tmp_path / "inputs")
    row = {"cls": type(model).__name__, "folder": str(tmp_path / "out"), "inputs": str(tmp_path / "inputs")}
    python(PLAIN, json.dumps([row]))
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "out" / "logits"), mpq(**inputs)[0])


def test_what_is_made_for_vllm_has_the_words_of_compressed_tensors_itself(tmp_path):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    _, _, mpq = in_groups(tmp_path / "float", "vllm")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        mpq.export(tmp_path / "out", "compressed-tensors")
    assert [str(w.message) for w in told if "hub_mpq" in w.filename] == [
        "zero points are stored for vLLM; transformers with compressed-tensors 0.20 cannot read them"
    ]
    state = load_file(tmp_path / "out" / "model.safetensors")
    groups = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["config_groups"]
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    names = []
    for group in groups.values():
        for name in group["targets"]:
            parts = {k.rpartition(".")[2]: v for k, v in state.items() if k.startswith(f"{name}.")}
            scheme = QuantizationScheme(**{k: v for k, v in group.items() if k != "targets"}, targets=[name])
            weight = compressor.decompress(dict(parts), scheme)["weight"]
            layer = mpq.model.get_submodule(name)
            assert torch.equal(weight, layer.weight_quantizer(layer.weight))
            packed = compressor.compress(compressor.decompress(dict(parts), scheme), scheme)
            assert all(torch.equal(packed[part], parts[part]) for part in parts)
            names.append(name)
    assert len(names) == 14


def test_a_recipe_gives_every_layer_its_own_scheme(tmp_path):
    import yaml

    _, _, mpq = in_groups(tmp_path / "float")
    manifest = mpq._manifest(mpq.policy)
    recipe = yaml.safe_load(llm_compressor_recipe(manifest))
    groups = recipe["default_stage"]["default_modifiers"]["GPTQModifier"]["config_groups"]
    for layer in mpq.graph:
        found = [g["weights"] for g in groups.values() for target in g["targets"] if re.match(target[3:], layer.name)]
        bits = mpq.policy.bits[layer.name]
        assert found == ([] if layer.fixed else [scheme_of(bits)])
    assert "llm-compressor" in render_card("me/x", manifest, CardFacts({PACKED: 1}))


def test_one_bit_in_groups_is_widened(tmp_path):
    model, inputs = build("llama")
    model.save_pretrained(tmp_path / "float")
    mpq = HubMPQ.from_pretrained(tmp_path / "float", weight_only=True).apply_policy("W1g16", [inputs])
    with pytest.warns(UserWarning, match="1-bit weights are stored at 2 bits"):
        mpq.export(tmp_path / "out", "compressed-tensors")
    with torch.no_grad():
        read = type(model).from_pretrained(tmp_path / "out")
        assert torch.equal(read(**inputs)[0], mpq(**inputs)[0])


def test_words_are_those_of_the_packed_file(tmp_path):
    case = pack(tmp_path, "classifier", "W3")
    case.mpq = HubMPQ.from_pretrained(case.float_folder, fixed={"classifier": "W8"}).apply_policy("W3")
    case.mpq.save_pretrained(tmp_path / "own")
    case.mpq.export(tmp_path / "other", "compressed-tensors")
    own, other = load_file(tmp_path / "own" / "model.mpq.safetensors"), load_file(tmp_path / "other/model.safetensors")
    words = [key for key in other if key.endswith("weight_packed")]
    assert len(words) == 14
    assert all(torch.equal(own[key], other[key]) for key in words)


def test_what_it_cannot_say_is_refused_in_words(tmp_path, net):
    vit = pack(tmp_path / "vit", "vit", "W4")
    with pytest.raises(HubMPQError, match="conv2d"):
        vit.mpq.export(tmp_path / "x", "compressed-tensors")
    gpt2 = pack(tmp_path / "gpt2", "gpt2", "W4")
    with pytest.raises(HubMPQError, match="conv1d"):
        gpt2.mpq.export(tmp_path / "x", "compressed-tensors")
    llama = HubMPQ.from_pretrained(pack(tmp_path / "llama", "llama", "W4").float_folder, weight_only=True)
    llama.apply_policy("W4g24")
    with pytest.raises(
        HubMPQError, match=r"group_size that divides the columns; 24 does not divide the 32 columns of \d+ layers"
    ):
        llama.export(tmp_path / "x", "compressed-tensors")
    own = HubMPQ.from_module(net, torch.zeros(1, 1, 8, 8))
    with pytest.raises(HubMPQError, match="no policy"):
        own.export(tmp_path / "x", "onnx")
    own.apply_policy("W4")
    with pytest.raises(HubMPQError, match="transformers"):
        own.export(tmp_path / "x", "compressed-tensors")
    with pytest.raises(InvalidArgument, match="tflite"):
        own.export(tmp_path / "x", "tflite")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("kind", ["t5", "modernbert"])
def test_a_class_that_reads_packed_weights_while_it_is_loaded_is_refused(tmp_path, kind, monkeypatch):
    if kind == "t5":
        model, _ = build(kind)
    else:
        tokens = {f"{k}_token_id": 0 for k in ("pad", "cls", "sep", "bos", "eos")}
        model = transformers.ModernBertModel(transformers.ModernBertConfig(**SMALL, **TEXT, **tokens))
    model.save_pretrained(tmp_path / "float")
    mpq = HubMPQ.from_pretrained(tmp_path / "float", weight_only=True, sequence_length=8).apply_policy("W4A32")
    with pytest.raises(HubMPQError, match=f"cannot load {type(model).__name__}.*reads packed weights"):
        mpq.export(tmp_path / "out", "compressed-tensors")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr("hub_mpq.export.compressed_tensors.check_loadable", lambda *_: None)
    mpq.export(tmp_path / "out", "compressed-tensors")
    with pytest.raises(AttributeError, match="weight"):  # why it is refused
        type(model).from_pretrained(tmp_path / "out")


def test_a_format_in_the_table_is_one_that_export_writes(net, monkeypatch, tmp_path):
    mpq = HubMPQ.from_module(net, torch.zeros(1, 1, 8, 8)).apply_policy("W4")
    given = []
    monkeypatch.setitem(FORMATS, "toy", lambda *args: given.append(args) or 7)
    assert mpq.export(tmp_path, "toy") == 7
    ((folder, model, manifest, config, example),) = given
    assert (model, dict(config), example) == (mpq.model, {}, mpq.source.example)
    assert folder.parent == tmp_path.parent, "a folder beside it, which takes its place when all is written"
    assert manifest.policy == mpq.policy
    with pytest.raises(InvalidArgument, match="choose from compressed-tensors, gguf, onnx, toy"):
        mpq.export(tmp_path, "tflite")


def test_weights_that_are_used_outside_their_layers_are_one_network(tmp_path):
    """MobileBERT's head multiplies by a concatenation of weights, Gemma's shares that of an embedding that scales."""
    from hub_mpq.core.library import libraries
    from hub_mpq.export.float_copy import float_copy_state

    text = {**SMALL, **TEXT}
    small = {"embedding_size": 16, "intra_bottleneck_size": 16, "num_feedforward_networks": 2}
    for cls, config in (
        (transformers.MobileBertForMaskedLM, transformers.MobileBertConfig(**text, **small)),
        (transformers.GemmaForCausalLM, transformers.GemmaConfig(**text, num_key_value_heads=2, head_dim=16)),
    ):
        torch.manual_seed(0)
        where = tmp_path / cls.__name__
        cls(config).save_pretrained(where / "float")
        mpq = HubMPQ.from_pretrained(where / "float", weight_only=True, sequence_length=12)
        mpq.apply_policy("W3A32")
        mpq.save_pretrained(where / "packed")
        mpq.export(where / "exported", "compressed-tensors")
        plain = cls(config).eval()
        plain.load_state_dict(float_copy_state(mpq.model, libraries.get("transformers")), strict=False)
        plain.tie_weights()
        with torch.no_grad():
            want = mpq.model(**IDS).logits
            assert torch.equal(HubMPQ.from_pretrained(where / "packed").model(**IDS).logits, want)
            assert torch.equal(cls.from_pretrained(where / "packed")(**IDS).logits, want)
            assert torch.equal(plain(**IDS).logits, want)
            assert torch.equal(cls.from_pretrained(where / "exported")(**IDS).logits, want)
            assert not torch.allclose(mpq.float_model(**IDS).logits, want, rtol=0.01)
