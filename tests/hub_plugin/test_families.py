"""Models with stacked experts or scaled embeddings, through every way that a packed model goes."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from family_toys import CONFIGS, IDS, STACKED, Family, build, make
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hub_mpq import HubMPQ
from hub_mpq.core.files import PACKED
from hub_mpq.core.library import libraries
from hub_mpq.export.float_copy import float_copy_state
from hub_mpq.nn.packing import predicted_nbytes


@pytest.fixture(scope="module", params=CONFIGS)
def family(request: Any, tmp_path_factory: Any) -> Family:
    return make(tmp_path_factory.mktemp(request.param), request.param)


def test_at_least_95_percent_of_the_weights_are_quantized(family):
    graph = family.mpq.graph
    quantized = sum(layer.weight_count for layer in graph if layer.weight_owner is None)
    assert quantized >= 0.95 * (quantized + sum(op.weight_count for op in graph.floats))


def test_all_ways_of_loading_give_the_same_logits(family):
    wanted = family.logits()
    assert torch.equal(family.logits(HubMPQ.from_pretrained(family.folder)), wanted)
    model, info = family.cls.from_pretrained(family.folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(family.logits(model), wanted)
    plain = family.logits(family.mpq.float_model)
    assert 0.7 < torch.cosine_similarity(wanted.flatten(), plain.flatten(), 0) < 1  # the float model's, quantized
    assert not torch.equal(wanted, plain)


def test_the_size_is_known_to_the_byte(family):
    mpq = family.mpq
    assert family.size == (family.folder / PACKED).stat().st_size
    assert predicted_nbytes(mpq.float_model, mpq._manifest(mpq.policy)) == family.size
    assert mpq.usage().amounts["size"] == family.size


def test_every_shared_weight_is_stored_once(family):
    """Beside each packed weight there is no float one, and its elements count once in the file."""
    with safe_open(family.folder / PACKED, "pt") as file:
        sizes = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    stored = sum(t.numel() * t.element_size() for t in sizes.values())
    graph, bits = family.mpq.graph, family.mpq.policy.bits
    model = family.mpq.float_model
    whole = {id(p): p.numel() for p in model.parameters()}
    packed = {id(model.get_submodule(x.name).weight): (x, bits[x.name].weight) for x in graph}
    least = sum(x.weight_count * b // 8 for x, b in packed.values())
    rest = 4 * sum(count for key, count in whole.items() if key not in packed)
    scales = sum(t.numel() * 4 for name, t in sizes.items() if name.endswith("weight_scale"))
    shapes = sum(t.numel() * 8 for name, t in sizes.items() if name.endswith("weight_shape"))
    buffers = {k for k, _ in model.named_buffers()} & set(model.state_dict())
    rest += sum(t.numel() * t.element_size() for k, t in model.state_dict().items() if k in buffers)
    assert least <= stored - rest - scales - shapes < 1.01 * least + 16 * len(packed)


def test_generate_with_packed_weights(family):
    model = family.cls.from_pretrained(family.folder)
    with torch.no_grad():
        wanted = family.mpq.model.generate(IDS, max_new_tokens=4, do_sample=False)
        assert torch.equal(model.generate(IDS, max_new_tokens=4, do_sample=False), wanted)


def test_a_float_copy_is_one_of_plain_transformers(family, tmp_path):
    """Of the model with quantizers and of the packed one: names on disk, shapes and dtypes are transformers' own."""
    wanted = family.logits()
    own = load_file(family.float_folder / "model.safetensors")
    shutil.copy(family.float_folder / "config.json", tmp_path)
    for model in (family.mpq.model, family.cls.from_pretrained(family.folder)):
        state = float_copy_state(model, libraries.get("transformers"))
        assert sum(t.numel() for t in state.values()) == sum(t.numel() for t in own.values())
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
        plain, info = family.cls.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert not info["mismatched_keys"]
        torch.testing.assert_close(family.logits(plain), wanted, rtol=1e-4, atol=1e-5)


def test_dequantize_gives_the_float_model_back(family):
    model = family.cls.from_pretrained(family.folder)
    model.dequantize()
    plain = family.cls.from_pretrained(family.float_folder)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    torch.testing.assert_close(family.logits(model), family.logits(), rtol=1e-4, atol=1e-5)


def test_quantized_while_it_is_loaded(family):
    from hub_mpq.hub.plugin import MPQConfig

    model = family.cls.from_pretrained(
        family.float_folder, quantization_config=MPQConfig(policy="W4", calibration=[family.inputs])
    )
    inputs = {name: level.activation for name, level in model.config.quantization_config.policy.bits.items()}
    stacks = [name for name in inputs if ".experts." in name]
    assert len(stacks) == {"deepseek_v3": 2}.get(family.kind, 4 * (family.kind in STACKED))
    assert all(inputs[name] == 32 for name in stacks)
    assert torch.isfinite(family.logits(model)).all()


def test_one_step_of_fine_tuning(family, tmp_path):
    """Every weight and scale gets a gradient, and the trained model is saved as it is."""
    mpq = HubMPQ.from_pretrained(family.folder)
    layers = {layer.name: mpq.model.get_submodule(layer.name) for layer in mpq.graph if layer.weight_owner is None}
    before = {name: (m.weight.detach().clone(), m.weight_quantizer.scale.detach()) for name, m in layers.items()}
    mpq.finetune([{"input_ids": IDS, "labels": IDS}], steps=1, lr=1e-3)
    for name, module in layers.items():
        assert not torch.equal(module.weight, before[name][0]), name
        assert not torch.equal(module.weight_quantizer.scale, before[name][1]), name
    mpq.save_pretrained(tmp_path / "tuned")
    assert torch.equal(family.logits(HubMPQ.from_pretrained(tmp_path / "tuned")), family.logits(mpq))


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_groups_and_zero_points_of_experts(kind, tmp_path):
    family = make(tmp_path, kind, "W3g16z")
    wanted = family.logits()
    assert predicted_nbytes(family.mpq.float_model, family.mpq._manifest(family.mpq.policy)) == family.size
    assert torch.equal(family.logits(HubMPQ.from_pretrained(family.folder)), wanted)
    assert torch.equal(family.logits(family.cls.from_pretrained(family.folder)), wanted)
    assert any(bits.grouped for name, bits in family.mpq.policy.bits.items() if ".experts." in name)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_stacks_that_are_left_out_stay_float(kind, tmp_path):
    build(kind).save_pretrained(tmp_path / "float")
    out = "model.layers.1.mlp.experts.down_proj"
    mpq = HubMPQ.from_pretrained(tmp_path / "float", weight_only=True, exclude=[out])
    mpq.apply_policy("W4").save_pretrained(tmp_path / "packed")
    family = Family(kind, tmp_path / "float", tmp_path / "packed", mpq, 0, type(mpq.model))
    assert out not in mpq.policy.bits
    with safe_open(tmp_path / "packed" / PACKED, "pt") as file:
        assert out in file.keys()  # noqa: SIM118
    model, info = family.cls.from_pretrained(family.folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(family.logits(model), family.logits())
    assert torch.equal(family.logits(HubMPQ.from_pretrained(family.folder)), family.logits())


def test_a_float_model_saves_itself_as_it_was_loaded(tmp_path):
    build("mixtral").save_pretrained(tmp_path / "float")
    HubMPQ.from_pretrained(tmp_path / "float").float_model.save_pretrained(tmp_path / "again")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("float", "again"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_bfloat16(tmp_path):
    """Scaled embeddings multiply in the model's own dtype, and packed ones as the quantized do."""
    for kind in ("gemma3", "bart", "mixtral"):
        build(kind).to(torch.bfloat16).save_pretrained(tmp_path / kind)
        mpq = HubMPQ.from_pretrained(tmp_path / kind, weight_only=True)
        cls = type(mpq.model)
        plain = cls.from_pretrained(tmp_path / kind)
        family = Family(kind, tmp_path, tmp_path / f"{kind}-packed", mpq, 0, cls)
        assert torch.equal(family.logits(), family.logits(plain)), kind
        mpq.apply_policy("W8").save_pretrained(family.folder)
        wanted = family.logits()
        assert wanted.dtype == torch.bfloat16
        assert torch.equal(family.logits(cls.from_pretrained(family.folder)), wanted), kind
        assert torch.equal(family.logits(HubMPQ.from_pretrained(family.folder)), wanted), kind
