"""compressed-tensors with quantized inputs: the same grids in signed codes, in plain transformers bit for bit."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from plugin_toys import build, python
from safetensors.torch import load_file, save_file
from test_export_compressed import PLAIN

from hub_mpq import HubMPQ, LayerBits, Policy
from hub_mpq.errors import HubMPQError
from hub_mpq.quantizers import LSQ

SOME = {
    "W8A8": ("classifier", lambda k, layer: LayerBits(8, 8)),
    "W4A8": ("llama", lambda k, layer: LayerBits(4, 8)),
    "W1A8": ("bert", lambda k, layer: LayerBits(1, 8)),
    "every width": ("classifier", lambda k, layer: LayerBits(1 + k % 8, 8 - k % 8)),
    "mixed and tied": ("llama", lambda k, layer: LayerBits(2 + k % 7, 1 + (k // 3) % 8)),
    "weights alone too": ("classifier", lambda k, layer: LayerBits(4, 8 if k % 2 else 32)),
}


def quantized(folder, kind, bits, **how):
    """(the float model, one input, its HubMPQ at widths by number and layer)."""
    model, inputs = build(kind)
    model.save_pretrained(folder)
    mpq = HubMPQ.from_pretrained(folder)
    own = {x.name: x.fixed or x.fitted(bits(k, x)) for k, x in enumerate(mpq.graph)}
    return model, inputs, mpq.apply_policy(Policy(own, mpq.graph.digest), [inputs], **how)


def export(mpq, folder):
    """(config groups, tensors, what was warned of) of the exported folder."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        mpq.export(folder, "compressed-tensors")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    own = [str(w.message) for w in told if "hub_mpq" in w.filename]
    return config, load_file(folder / "model.safetensors"), own


def test_logits_are_equal_in_plain_transformers(tmp_path):
    from compressed_tensors.quantization import QuantizationConfig

    rows, want = [], []
    for name, (kind, bits) in SOME.items():
        where = tmp_path / name.replace(" ", "-")
        model, inputs, mpq = quantized(where / "float", kind, bits)
        config, _, _ = export(mpq, where / "out")
        QuantizationConfig.model_validate(config)
        save_file(inputs, where / "inputs")
        rows.append({"cls": type(model).__name__, "folder": str(where / "out"), "inputs": str(where / "inputs")})
        with torch.no_grad():
            want.append(mpq(**inputs)[0])
            # what would be missed if inputs stayed float
            assert not torch.allclose(type(model).from_pretrained(where / "float")(**inputs)[0], want[-1], rtol=1e-5)
    python(PLAIN, json.dumps(rows))
    for name, row, logits in zip(SOME, rows, want, strict=True):
        assert torch.equal(torch.load(row["folder"] + "/logits"), logits), name


@pytest.mark.parametrize("bits", range(1, 9))
def test_signed_codes_are_the_same_grid(bits):
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize

    from hub_mpq.export.compressed_tensors import _input_parts, input_scheme_of

    x = 24 * torch.rand(8000, generator=torch.Generator().manual_seed(bits)) - 12
    for zero in {0, 1, 2 ** (bits - 1), 2**bits - 1}:
        lsq = LSQ([bits], signed=False)
        lsq.init(bits, torch.tensor([0.0371]), zero)
        tensors = {"x.input_scale": lsq.scale.detach(), "x.input_zero_point": torch.tensor([zero], dtype=torch.int32)}
        parts = _input_parts("x", tensors, bits)
        symmetric = "input_zero_point" not in parts
        assert symmetric == (zero == 2 ** (bits - 1))
        args = QuantizationArgs(**input_scheme_of(LayerBits(4, bits), symmetric))
        found = fake_quantize(x, parts["input_scale"], parts.get("input_zero_point"), args)
        assert torch.equal(found, lsq(x).detach())
        assert len(found.unique()) == 2**bits


def test_int8_is_what_vllms_kernels_take(tmp_path):
    """Static int8 inputs, one scale a tensor, and symmetric int8 weights, one scale for each output channel."""
    _, _, mpq = quantized(tmp_path / "float", "classifier", lambda k, x: LayerBits(3 + k % 5, 8))
    config, state, told = export(mpq, tmp_path / "out")
    assert config["format"] == "int-quantized"
    assert {g["format"] for g in config["config_groups"].values()} == {"int-quantized"}
    names = []
    for group in config["config_groups"].values():
        weights, inputs = group["weights"], group["input_activations"]
        assert (weights["num_bits"], weights["symmetric"], weights["strategy"]) == (8, True, "channel")
        assert (inputs["num_bits"], inputs["strategy"], inputs["type"]) == (8, "tensor", "int")
        assert weights["dynamic"] is inputs["dynamic"] is False
        for name in group["targets"]:
            out, columns = mpq.model.get_submodule(name).weight.shape
            assert (state[f"{name}.weight"].dtype, state[f"{name}.weight"].shape) == (torch.int8, (out, columns))
            assert (state[f"{name}.weight_scale"].shape, state[f"{name}.input_scale"].shape) == ((out, 1), (1,))
            assert int(state[f"{name}.weight"].int().abs().max()) <= 2 ** (mpq.policy.bits[name].weight - 1)
            assert (f"{name}.input_zero_point" in state) != inputs["symmetric"]
            names.append(name)
    assert sorted(names) == [x.name for x in sorted(mpq.graph, key=lambda x: x.name) if x.kind == "linear"]
    assert [x for x in told if "vLLM cannot" in x] == []
    assert any("stored at 8 bits for vLLM" in x for x in told)


def test_weights_keep_their_width_where_vllm_has_no_kernel(tmp_path):
    _, _, mpq = quantized(tmp_path / "float", "classifier", lambda k, x: LayerBits(4, 6))
    config, state, told = export(mpq, tmp_path / "out")
    assert config["format"] == "pack-quantized"
    groups = {name.removesuffix("_asymmetric") for name in config["config_groups"]}
    assert groups == {"group_W4A6", "group_W8A8"}
    assert any("vLLM cannot: it supports only 8-bit inputs" in x for x in told)
    assert not any("at 8 bits" in x for x in told)
    assert any(name.endswith("weight_packed") for name in state)


def test_a_tied_head_is_told_and_a_pin_leaves_its_input_float(tmp_path):
    model, inputs, mpq = quantized(tmp_path / "float", "llama", lambda k, x: LayerBits(8, 8))
    config, _, told = export(mpq, tmp_path / "out")
    heads = [g for g in config["config_groups"].values() if g["targets"] == ["lm_head"]]
    assert [(g["weights"], g["format"], g["input_activations"]["num_bits"]) for g in heads] == [(None, "dense", 8)]
    assert {g["format"] for g in config["config_groups"].values()} == {"dense", "pack-quantized"}
    assert any("leave it float with fixed={'lm_head': 'W8'}" in x for x in told)
    mpq = HubMPQ.from_pretrained(tmp_path / "float", fixed={"lm_head": "W8"}).apply_policy("W8A8", [inputs])
    config, _, told = export(mpq, tmp_path / "again")
    assert config["format"] == "int-quantized"
    assert told == []
    with torch.no_grad():
        assert torch.equal(type(model).from_pretrained(tmp_path / "again")(**inputs)[0], mpq(**inputs)[0])


def test_scales_that_vllm_would_merge_are_told(tmp_path):
    _, _, mpq = quantized(tmp_path / "float", "classifier", lambda k, x: LayerBits(8, 8))
    assert export(mpq, tmp_path / "out")[2] == []
    query = next(m for n, m in mpq.model.named_modules() if n.endswith("self.query"))
    with torch.no_grad():
        query.input_quantizer.shift += 0.1
    told = export(mpq, tmp_path / "again")[2]
    assert len(told) == 1
    assert "different scales" in told[0]


def test_a_range_far_from_zero_is_refused(tmp_path):
    _, _, mpq = quantized(tmp_path / "float", "classifier", lambda k, x: LayerBits(8, 8))
    name, layer = next((n, m) for n, m in mpq.model.named_modules() if n.endswith("self.query"))
    layer.input_quantizer.zero_points.fill_(-1)
    with pytest.raises(HubMPQError, match=f"input range of layer '{name}' is too far from zero"):
        mpq.export(tmp_path / "out", "compressed-tensors")
    assert not (tmp_path / "out").exists()


def test_a_packed_model_is_exported_too(tmp_path):
    _, _, mpq = quantized(tmp_path / "float", "classifier", lambda k, x: LayerBits(4, 8))
    mpq.save_pretrained(tmp_path / "packed")
    _, want, _ = export(mpq, tmp_path / "out")
    for resident in (None, "packed"):
        again = HubMPQ.from_pretrained(tmp_path / "packed", resident=resident)
        _, found, _ = export(again, tmp_path / str(resident))
        assert found.keys() == want.keys()
        assert all(torch.equal(found[name], want[name]) for name in want)
