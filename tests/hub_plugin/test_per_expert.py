"""One decision per expert, on request: from the graph to packed files and back."""

from __future__ import annotations

import copy
import logging
import pickle
import shutil
from typing import Any

import pytest
import torch
import transformers
from family_toys import IDS, Family, build
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hub_mpq import HubMPQ, MPQConfig, Policy
from hub_mpq.core import LayerBits
from hub_mpq.core.files import PACKED
from hub_mpq.core.library import libraries
from hub_mpq.errors import InvalidArgument
from hub_mpq.export.float_copy import float_copy_state
from hub_mpq.nn.input_moments import input_moments
from hub_mpq.nn.packing import predicted_nbytes
from hub_mpq.nn.split_experts import SplitStack
from hub_mpq.pack import write_indicators
from hub_mpq.search.sensitivity import _fill_unreached
from hub_mpq.train.round_weights import round_weights

KINDS = ["mixtral", "qwen3_moe", "gpt_oss"]
STACK = "model.layers.1.mlp.experts.down_proj"
LEVELS = ["W2", "W3g16", "W4", "W5g16z", "W8"]


def loaded(root: Any, kind: str, **more: Any) -> HubMPQ:
    if not (root / "float").exists():
        build(kind).save_pretrained(root / "float")
    return HubMPQ.from_pretrained(root / "float", weight_only=True, sequence_length=12, **more)


def mixed(mpq: HubMPQ) -> Policy:
    """Widths, groups and zero points by turns."""
    levels = [LayerBits.parse(level + "A32") for level in LEVELS]
    bits = {x.name: x.fixed or x.fitted(levels[i % len(levels)]) for i, x in enumerate(mpq.graph)}
    return Policy(bits, mpq.graph.digest)


@pytest.fixture(scope="module", params=KINDS)
def family(request: Any, tmp_path_factory: Any) -> Family:
    root = tmp_path_factory.mktemp(request.param)
    mpq = loaded(root, request.param, per_expert=True)
    mpq.apply_policy(mixed(mpq), [{"input_ids": IDS}])
    size = mpq.save_pretrained(root / "packed")
    return Family(request.param, root / "float", root / "packed", mpq, size, type(mpq.model))


def test_the_graph_has_a_layer_for_each_matrix(family):
    """Which together have what the stack has: weights, products, features, bytes."""
    one, each = loaded(family.folder.parent, family.kind).graph, family.mpq.graph
    assert one.floats == each.floats
    assert one.other_bytes == each.other_bytes
    for stack in one:
        parts = [x for x in each if x.name.startswith(f"{stack.name}.")] or [each[stack.name]]
        assert len(parts) == (stack.weight_shape[0] if ".experts." in stack.name else 1)
        for count in ("weight_count", "macs", "activation_count"):
            values = [getattr(x, count) for x in parts]
            assert sum(values) == getattr(stack, count)
            assert max(values) - min(values) <= 1
    assert [x.name.removesuffix(".0") for x in each if not x.name[-1].isdigit() or x.name.endswith(".0")] == [
        x.name for x in one
    ]


def test_the_float_model_is_the_same(family, tmp_path):
    """Also as it saves itself, in one piece of memory, and as copies and pickles."""
    mpq = family.mpq
    plain = family.cls.from_pretrained(family.float_folder).eval()
    wanted = family.logits(loaded(family.folder.parent, family.kind).float_model)
    for net in (mpq.float_model, copy.deepcopy(mpq.float_model), pickle.loads(pickle.dumps(mpq.float_model))):  # noqa: S301
        assert torch.equal(family.logits(net), wanted)
        state = net.state_dict()
        assert {key: value.shape for key, value in state.items()} == {k: v.shape for k, v in plain.state_dict().items()}
        assert all(torch.equal(value, state[key]) for key, value in plain.state_dict().items())
    stack = mpq.float_model.get_submodule(STACK)
    assert isinstance(stack, SplitStack)
    assert stack.whole().data_ptr() == stack.get_submodule("0").weight.data_ptr()
    mpq.float_model.save_pretrained(tmp_path)
    one, two = (load_file(folder / "model.safetensors") for folder in (family.float_folder, tmp_path))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    mpq.float_model.load_state_dict(plain.state_dict())


def test_all_ways_of_loading_give_the_same_logits(family):
    wanted = family.logits()
    pulled = HubMPQ.from_pretrained(family.folder)
    assert torch.equal(family.logits(pulled), wanted)
    assert pulled.policy == family.mpq.policy
    assert pulled.graph.layers == family.mpq.graph.layers
    model, info = family.cls.from_pretrained(family.folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(family.logits(model), wanted)
    assert not torch.equal(wanted, family.logits(family.mpq.float_model))
    bare = type(model.model).from_pretrained(family.folder)  # without its head, under other names
    assert torch.equal(bare(input_ids=IDS).last_hidden_state, model.model(input_ids=IDS).last_hidden_state)
    with torch.no_grad():
        tokens = family.mpq.model.generate(IDS, max_new_tokens=4, do_sample=False)
        assert torch.equal(model.generate(IDS, max_new_tokens=4, do_sample=False), tokens)
    longer = HubMPQ.from_pretrained(family.folder, sequence_length=16).graph
    assert longer[f"{STACK}.0"].macs == family.mpq.graph[f"{STACK}.0"].macs * 16 // 12


def test_every_byte_is_counted(family):
    mpq = family.mpq
    assert family.size == (family.folder / PACKED).stat().st_size
    assert predicted_nbytes(mpq.float_model, mpq._manifest(mpq.policy)) == family.size
    assert mpq.usage().amounts["size"] == family.size
    assert mpq.usage()["bitops"] == sum(x.macs * mpq.policy.bits[x.name].weight * 32 for x in mpq.graph) + sum(
        op.macs * 32 * 32 for op in mpq.graph.floats
    )


def test_a_float_copy_is_one_of_plain_transformers(family, tmp_path):
    wanted = family.logits()
    shutil.copy(family.float_folder / "config.json", tmp_path)
    packed = family.cls.from_pretrained(family.folder)
    for model in (family.mpq.model, packed):
        state = float_copy_state(model, libraries.get("transformers"))
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
        plain, info = family.cls.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        torch.testing.assert_close(family.logits(plain), wanted, rtol=1e-4, atol=1e-5)
    packed.dequantize()
    fresh = family.cls.from_pretrained(family.float_folder)
    assert [type(m) for m in packed.modules()] == [type(m) for m in fresh.modules()]
    torch.testing.assert_close(family.logits(packed), wanted, rtol=1e-4, atol=1e-5)


def test_quantized_while_it_is_loaded(family):
    from hub_mpq.hub.plugin import MPQConfig

    model = family.cls.from_pretrained(family.float_folder, quantization_config=MPQConfig(family.mpq.policy))
    assert model.config.quantization_config.policy == family.mpq.policy
    assert torch.isfinite(family.logits(model)).all()


@pytest.mark.parametrize("out", [f"{STACK}.[13]", f"{STACK}.*"])
def test_experts_that_are_left_out_stay_float(out, tmp_path):
    mpq = loaded(tmp_path, "mixtral", per_expert=True, exclude=[out])
    assert sum(op.macs for op in mpq.graph.floats if op.name.startswith(STACK)) > 0
    whole = loaded(tmp_path, "mixtral").graph
    assert sum(x.macs for x in (*mpq.graph, *mpq.graph.floats)) == sum(x.macs for x in (*whole, *whole.floats))
    size = mpq.apply_policy("W4", [{"input_ids": IDS}]).save_pretrained(tmp_path / "packed")
    assert predicted_nbytes(mpq.float_model, mpq._manifest(mpq.policy)) == size
    with safe_open(tmp_path / "packed" / PACKED, "pt") as file:
        assert (f"{STACK}.1" if "[" in out else STACK) in file.keys()  # noqa: SIM118
    family = Family("mixtral", tmp_path / "float", tmp_path / "packed", mpq, size, type(mpq.model))
    model, info = family.cls.from_pretrained(family.folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(family.logits(model), family.logits())
    assert torch.equal(family.logits(HubMPQ.from_pretrained(family.folder)), family.logits())
    state = float_copy_state(model, libraries.get("transformers"))
    assert torch.equal(
        state["model.layers.1.block_sparse_moe.experts.1.w2.weight"],
        mpq.float_model.get_submodule(f"{STACK}.1").weight[0],
    )


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_experts_are_scored_searched_and_rounded_one_by_one(kind, tmp_path):
    """Scores, a search and its policy's own weights; experts that see more tokens matter more."""
    mpq = loaded(tmp_path, kind, per_expert=True)
    ids = torch.randint(3, 250, (8, 12), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": part} for part in ids.split(2)]
    mpq.quantize(weight_bits=3.0, train=data, epochs=0, candidates=(2, 4), validate=False)
    experts = {name: bits.weight for name, bits in mpq.policy.bits.items() if ".experts." in name}
    assert len(experts) == 16
    assert set(experts.values()) == {2, 4}
    assert mpq.usage()["weight_bits"] <= 3.0
    assert any(len({w for n, w in experts.items() if n.startswith(stack)}) == 2 for stack in {n[:-2] for n in experts})
    scores = {name: {b.weight: s for b, s in row.items()} for name, row in mpq.score_table()[0].items()}
    assert all(0 < scores[name][4] < scores[name][2] for name in experts)
    mpq.save_pretrained(tmp_path / "packed")
    assert torch.equal(HubMPQ.from_pretrained(tmp_path / "packed")(input_ids=IDS).logits, mpq(input_ids=IDS).logits)


def test_one_step_of_fine_tuning(family, tmp_path):
    mpq = HubMPQ.from_pretrained(family.folder)
    before = {x.name: mpq.model.get_submodule(x.name).weight.detach().clone() for x in mpq.graph}
    mpq.finetune([{"input_ids": IDS, "labels": IDS}], steps=1, lr=1e-3)
    assert not [name for name, weight in before.items() if torch.equal(mpq.model.get_submodule(name).weight, weight)]
    mpq.save_pretrained(tmp_path)
    assert torch.equal(family.logits(HubMPQ.from_pretrained(tmp_path)), family.logits(mpq))


def test_experts_that_no_token_reaches_have_what_the_others_have(tmp_path, caplog):
    """Scores and moments of their stack's others."""
    mpq = loaded(tmp_path, "mixtral", per_expert=True)
    stack = mpq.float_model.model.layers[1].mlp.experts
    stack.register_forward_pre_hook(lambda _m, args: (args[0], args[1].clamp_max(2), args[2]))  # none reaches 3
    data = [{"input_ids": IDS}]
    scores = mpq.train_scores(data, strategy="gradient", candidates=(2, 4)).pairs
    rows = [{b.weight: s for b, s in scores[f"{STACK}.{i}"].items()} for i in range(4)]
    for bits in (2, 4):
        assert rows[3][bits] == pytest.approx(sum(row[bits] for row in rows[:3]) / 3)
    choice = LayerBits(3, 32)
    with caplog.at_level(logging.WARNING):
        choices = {f"{STACK}.{i}": (choice,) for i in range(4)}
        rounded = round_weights(mpq.float_model, mpq.graph, choices, data, folder=tmp_path / "rounded")
    assert rounded.unreached == {f"{STACK}.3": 1}
    assert f"the batches have no tokens for 1 expert matrices (of {STACK}.3)" in caplog.text
    whole = loaded(tmp_path, "mixtral")
    whole.float_model.model.layers[1].mlp.experts.register_forward_pre_hook(
        lambda _m, args: (args[0], args[1].clamp_max(2), args[2])
    )
    together = round_weights(whole.float_model, whole.graph, {STACK: (choice,)}, data).packed(STACK, choice)
    for i in range(4):
        assert torch.equal(rounded.packed(f"{STACK}.{i}", choice).dequantize()[0], together.dequantize()[i])
    # stopped before it: what it is rounded by are the others
    (tmp_path / "rounded" / rounded._file(mpq.graph[f"{STACK}.3"]).name).unlink()
    again = round_weights(mpq.float_model, mpq.graph, choices, data, folder=tmp_path / "rounded", resume=True)
    assert torch.equal(again.packed(f"{STACK}.3", choice).dequantize()[0], together.dequantize()[3])


def test_it_is_for_models_with_experts(tmp_path):
    with pytest.raises(InvalidArgument, match="per_expert requires a model with stacked experts"):
        loaded(tmp_path, "gemma3", per_expert=True)
    with pytest.raises(InvalidArgument, match="per_expert requires a network with stacked experts"):
        HubMPQ.from_module(torch.nn.Sequential(torch.nn.Linear(2, 2)), torch.zeros(1, 2), per_expert=True)


def test_a_users_own_network_stays_as_it_is(tmp_path):
    net = build("mixtral")
    before = net.state_dict(keep_vars=True)
    mpq = HubMPQ.from_module(net, {"input_ids": IDS[:1]}, per_expert=True)
    assert f"{STACK}.3" in mpq.graph.names
    assert all(before[key] is value for key, value in net.state_dict(keep_vars=True).items())
    part = mpq.float_model.get_submodule(f"{STACK}.3").weight
    assert part.data_ptr() == net.get_submodule("model.layers.1.mlp.experts").down_proj[3].data_ptr()
    mpq.apply_policy("W4", [{"input_ids": IDS}]).save_pretrained(tmp_path)
    assert torch.equal(HubMPQ.from_pretrained(tmp_path, module=net)(input_ids=IDS).logits, mpq(input_ids=IDS).logits)
    assert all(before[key] is value for key, value in net.state_dict(keep_vars=True).items())


def test_moments_of_a_stack_are_read_at_once(tmp_path, monkeypatch):
    """However little memory there is, in networks without blocks: experts that no token reached have what all the
    others read."""
    monkeypatch.setattr("hub_mpq.nn.input_moments.blocks_of", lambda *_: None)
    found = {}
    for per_expert in (True, False):
        mpq = loaded(tmp_path, "mixtral", per_expert=per_expert)
        stack = mpq.float_model.model.layers[1].mlp.experts
        stack.register_forward_pre_hook(lambda _m, args: (args[0], args[1].clamp_max(2), args[2]))  # none reaches 3
        layers = [x for x in mpq.graph if x.name.startswith(STACK)]
        parts = input_moments(mpq.float_model, layers, [{"input_ids": IDS}], lambda net, x: net(**x), limit=1)
        found[per_expert] = torch.cat([part.moments[x.name] for part in parts for x in part.layers])
    assert torch.equal(found[True], found[False])


@pytest.mark.filterwarnings("ignore:no calibration")
def test_a_budget_is_met_by_stored_scores_of_each_expert(tmp_path):
    mpq = loaded(tmp_path, "mixtral", per_expert=True)
    mpq.quantize(size="W3", train=[{"input_ids": IDS}], epochs=0, validate=False)
    write_indicators(tmp_path / "float" / "indicators.safetensors", mpq.scores)
    limit = int(mpq.usage("W3")["size"]) + 4000  # inputs of fixed layers are quantized too
    config = MPQConfig(size=limit)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    assert f"{STACK}.3" in model.hf_quantizer.manifest.policy.bits
    model.save_pretrained(tmp_path / "packed")
    assert (tmp_path / "packed" / PACKED).stat().st_size <= limit


def test_an_expert_whose_error_is_zero_was_reached(tmp_path):
    """The spread of one sample is zero; that no token came is told by the mean."""
    net = loaded(tmp_path, "mixtral", per_expert=True).float_model
    layers = {f"{STACK}.{i}": net.get_submodule(f"{STACK}.{i}") for i in range(4)}
    means = {name: {4: score} for name, score in zip(layers, (1.0, 2.0, 3.0, 0.0), strict=True)}
    errors = {name: {4: error} for name, error in zip(layers, (0.0, 0.2, 0.4, 0.0), strict=True)}
    _fill_unreached(net, layers, means, errors)
    assert [row[4] for row in means.values()] == [1.0, 2.0, 3.0, 2.0]
    assert [row[4] for row in errors.values()] == pytest.approx([0.0, 0.2, 0.4, 0.2])
