"""compressed-tensors: plain transformers with that package computes exactly what we compute."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from plugin_toys import IDS, SMALL, TEXT, build, pack, python
from safetensors.torch import load_file, save_file

from hub_mpq import HubMPQ, LayerBits, Policy
from hub_mpq.errors import HubMPQError, InvalidArgument
from hub_mpq.export import FORMATS

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
        with pytest.warns(UserWarning, match="vLLM"):
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
    case = pack(tmp_path, "bert", "W4A8")
    with pytest.raises(HubMPQError, match=r"weight-only.*inputs of 14 layers"):
        case.mpq.export(tmp_path / "x", "compressed-tensors")
    vit = pack(tmp_path / "vit", "vit", "W4")
    with pytest.raises(HubMPQError, match="conv2d"):
        vit.mpq.export(tmp_path / "x", "compressed-tensors")
    gpt2 = pack(tmp_path / "gpt2", "gpt2", "W4")
    with pytest.raises(HubMPQError, match="conv1d"):
        gpt2.mpq.export(tmp_path / "x", "compressed-tensors")
    own = HubMPQ.from_module(net, torch.zeros(1, 1, 8, 8))
    with pytest.raises(HubMPQError, match="no policy"):
        own.export(tmp_path / "x", "onnx")
    own.apply_policy("W4")
    with pytest.raises(HubMPQError, match="transformers"):
        own.export(tmp_path / "x", "compressed-tensors")
    with pytest.raises(InvalidArgument, match="gguf"):
        own.export(tmp_path / "x", "gguf")
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
    with pytest.raises(HubMPQError, match=f"can't load {type(model).__name__}.*reads weights that are packed"):
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
    assert (folder, model, dict(config), example) == (tmp_path, mpq.model, {}, mpq.source.example)
    assert manifest.policy == mpq.policy
    with pytest.raises(InvalidArgument, match="known: compressed-tensors, onnx, toy"):
        mpq.export(tmp_path, "gguf")


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
