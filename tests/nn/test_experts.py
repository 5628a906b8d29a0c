"""Stacks of experts as layers."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from hub_mpq import HubMPQ
from hub_mpq.adapters import build_graph
from hub_mpq.core import LayerSpec
from hub_mpq.nn.experts import ExpertStack, conceal_experts, expose_experts
from hub_mpq.nn.expose import names_of_parameters
from hub_mpq.nn.input_moments import input_moments
from hub_mpq.pack import pack_weight
from hub_mpq.quantizers import LSQ, weight_scale_mse

IDS = {"input_ids": (torch.arange(24).view(2, 12) * 7) % 48}


def build(family: str = "Mixtral", **changes: Any) -> Any:
    import transformers

    config = getattr(transformers, f"{family}Config")(
        **{
            **{"vocab_size": 48, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2},
            **{"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 16, "head_dim": 16},
            **{"num_local_experts": 4, "num_experts_per_tok": 2, **changes},
        }
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(**IDS).logits


@pytest.fixture(params=["Mixtral", "GptOss"])
def model(request: Any) -> Any:
    return build(request.param)


def test_the_parameters_are_the_same_and_so_is_the_state_dict(model):
    before, wanted = model.state_dict(keep_vars=True), logits(model)
    kind = model.config._experts_implementation
    assert expose_experts(model)
    assert expose_experts(model)
    after = model.state_dict(keep_vars=True)
    assert before.keys() == after.keys()
    assert all(before[key] is after[key] for key in before)
    stack = model.get_submodule("model.layers.0.mlp.experts.gate_up_proj")
    assert isinstance(stack, ExpertStack)
    assert stack.weight is before["model.layers.0.mlp.experts.gate_up_proj"]
    torch.testing.assert_close(logits(model), wanted, rtol=1e-5, atol=1e-6)
    model.load_state_dict({key: value.clone() for key, value in before.items()})
    conceal_experts(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in build(type(model).__name__[:-11]).modules()]
    assert model.config._experts_implementation == kind
    assert torch.equal(logits(model), wanted)
    assert not [m for m in model.modules() if "_concealed" in vars(m) or m._load_state_dict_pre_hooks]


def test_a_state_dict_loads_strictly_into_layers(model):
    state = {key: value.clone() for key, value in model.state_dict().items()}
    expose_experts(model)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    model.load_state_dict(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    with pytest.raises(RuntimeError, match="down_proj"):
        model.load_state_dict({key: value for key, value in state.items() if "down_proj" not in key})


def test_copies_and_pickles_run(model):
    expose_experts(model)
    wanted = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), wanted)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), wanted)  # noqa: S301


def test_a_new_model_of_its_config_runs(model):
    """The config names the way to compute experts; the new model's stacks are Parameters."""
    expose_experts(model)
    new = type(model)(model.config).eval()
    new.load_state_dict(model.state_dict())
    assert torch.equal(logits(new), logits(model))


def test_gradients_are_those_of_transformers(model):
    loss = model(**IDS, labels=IDS["input_ids"]).loss
    loss.backward()
    wanted = {key: p.grad.clone() for key, p in model.state_dict(keep_vars=True).items() if p.requires_grad}
    model.zero_grad()
    expose_experts(model)
    model(**IDS, labels=IDS["input_ids"]).loss.backward()
    for key, p in model.state_dict(keep_vars=True).items():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, wanted[key], rtol=1e-4, atol=1e-6, msg=key)


def test_a_users_own_network_stays_as_it_is(model):
    modules, state = list(model.modules()), model.state_dict(keep_vars=True)
    mpq = HubMPQ.from_module(model, IDS)
    assert list(model.modules()) == modules
    assert mpq.model is not model
    shared = mpq.model.state_dict(keep_vars=True)
    assert all(shared[key] is value for key, value in state.items())
    mpq.apply_policy("W4")
    assert model.state_dict(keep_vars=True).keys() == state.keys()
    assert [layer.name for layer in mpq.graph if layer.weight_only and "experts" in layer.name] == [
        f"model.layers.{i}.mlp.experts.{name}" for i in (0, 1) for name in ("gate_up_proj", "down_proj")
    ]


@pytest.mark.parametrize("meta", [False, True])
def test_products_count_for_the_experts_that_run(model, meta):
    """For a sample of 12 tokens, each of which reaches two of four experts."""
    model = model.to("meta") if meta else model
    expose_experts(model)
    graph = build_graph(model, {"input_ids": IDS["input_ids"][:1].to("meta" if meta else "cpu")}, model_id="x")
    for name, outputs, inputs in (("gate_up_proj", 80, 32), ("down_proj", 32, 40)):
        layer = graph[f"model.layers.1.mlp.experts.{name}"]
        assert layer.macs == 12 * 2 * outputs * inputs
        assert layer.activation_count == 12 * 2 * inputs
        assert layer.weight_count == 4 * outputs * inputs


def test_the_last_stack_of_a_bare_network_keeps_8_bits_and_a_float_input():
    mpq = HubMPQ.from_module(build().model, IDS)
    assert str(mpq.graph["layers.1.mlp.experts.down_proj"].fixed) == "W8A32"


@pytest.mark.parametrize("kind", ["experts", "experts_transposed"])
@pytest.mark.parametrize("bits", [1, 3, 4, 8])
def test_a_stack_packs_row_by_row(kind, bits):
    """As the matrices one after another, each of which is a linear layer."""
    shape = (3, 5, 7) if kind == "experts" else (3, 7, 5)
    generator = torch.Generator().manual_seed(0)
    top = 2 ** (bits - 1)
    values = torch.randint(-top, top, shape, generator=generator) if bits > 1 else torch.ones(shape).int()
    packed = pack_weight(values, torch.rand(15, generator=generator) + 0.1, kind, bits)
    assert torch.equal(packed.unpack(), values.to(torch.int8))
    whole = packed.dequantize()
    for i in range(3):
        rows = values[i].mT if kind == "experts_transposed" else values[i]
        linear = pack_weight(rows, packed.weight_scale[5 * i : 5 * (i + 1)], "linear", bits)
        assert torch.equal(linear.weight_packed, packed.weight_packed[5 * i : 5 * (i + 1)])
        one = linear.dequantize()
        one = one.mT if kind == "experts_transposed" else one
        assert torch.equal(packed.matrix(i), one)
        assert torch.equal(whole[i], one)


@pytest.mark.parametrize("axis", [-2, -1])
def test_a_stack_has_a_scale_for_each_row_of_each_matrix(axis):
    """And its quantizer gives one matrix what it gives all of them, gradients too."""
    weight = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    weight[1].select(axis, 2).zero_()  # a channel without a start
    weight.requires_grad_()
    channels = 3 * weight.shape[axis]
    q = LSQ((3,), signed=True, channels=channels, axis=axis)
    q.init(3, weight_scale_mse(weight, 3, axis=axis))
    each = [weight_scale_mse(w, 3, axis=axis % 3 - 1) for w in weight]
    assert torch.equal(q.base[0], torch.cat(each))
    whole = q(weight)
    parts = torch.stack([q.of_matrix(weight, i) for i in range(3)])
    assert torch.equal(whole, parts)
    towards = torch.randn(whole.shape, generator=torch.Generator().manual_seed(1))
    one, two = (torch.autograd.grad((x * towards).sum(), (weight, q.shift)) for x in (whole, parts))
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b)


def test_names_of_a_quantized_model_are_the_parameters():
    mpq = HubMPQ.from_module(build(), IDS)
    mpq.apply_policy("W4")
    names = names_of_parameters(mpq.model, {key: torch.zeros(1) for key in mpq.model.state_dict()})
    assert "model.layers.0.mlp.experts.down_proj" in names
    assert "model.layers.0.mlp.experts.down_proj.weight" not in names


@pytest.mark.parametrize("diagonal", [False, True])
def test_moments_are_of_the_tokens_that_reach_an_expert(diagonal):
    """And those of the whole stack for an expert that none reaches."""
    model = build(num_hidden_layers=1)
    mpq = HubMPQ.from_module(model, IDS)
    net = mpq.float_model
    name = "model.layers.0.mlp.experts.gate_up_proj"
    rows: dict[int, list[torch.Tensor]] = {}
    net.get_submodule(name).register_forward_pre_hook(lambda _m, args: rows.setdefault(args[1], []).append(args[0]))
    layers: list[LayerSpec] = [mpq.graph[name]]
    forced = net.model.layers[0].mlp.experts
    forced.register_forward_pre_hook(lambda _m, args: (args[0], args[1].clamp_max(2), args[2]))  # none reaches 3
    (found,) = [
        part
        for part in input_moments(net, layers, [IDS], lambda net, batch: net(**batch), diagonal=diagonal)
        if part.layers
    ]
    assert found.unreached == {name: 1}
    reached = {expert: torch.cat(x[:1]) for expert, x in rows.items()}
    assert sorted(reached) == [0, 1, 2]
    every = torch.cat(list(reached.values()))
    for expert in range(4):
        x = reached.get(expert, every)
        wanted = x.square().mean(0) if diagonal else x.t() @ x / len(x)
        torch.testing.assert_close(found.moments[name][expert], wanted, rtol=1e-4, atol=1e-6)
