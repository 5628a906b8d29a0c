"""Llama 4's experts: stacks with a forward of their own."""

import copy

import pytest
import torch
import transformers

from hub_mpq import HubMPQ
from hub_mpq.nn.expose import conceal_layers, expose_layers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = transformers.Llama4TextConfig(
        **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 16, "intermediate_size_mlp": 32},
        **{"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16},
        **{"num_local_experts": 8, "interleave_moe_layer_step": 1, "pad_token_id": 0},
    )
    torch.manual_seed(0)
    net = transformers.Llama4ForCausalLM(config)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0, 0.1)
    net.save_pretrained(path := tmp_path_factory.mktemp("llama4") / "float")
    return path


IDS = torch.arange(24).view(2, 12) % 64


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_the_float_function_and_the_state_dict_stay(folder):
    net = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    before, keys, cls = logits(net), list(net.state_dict()), type(net.model.layers[0].feed_forward.experts)
    expose_layers(net)
    expose_layers(net)
    assert torch.allclose(logits(net), before, atol=1e-6, rtol=0)
    assert list(net.state_dict()) == keys
    copied = copy.deepcopy(net)
    copied.load_state_dict(net.state_dict())
    assert logits(copied).equal(logits(net))
    conceal_layers(net)
    assert type(net.model.layers[0].feed_forward.experts) is cls
    assert logits(net).equal(before)
    assert list(net.state_dict()) == keys


@pytest.mark.parametrize("per_expert", [False, True])
def test_experts_are_quantized_counted_and_packed(folder, tmp_path, per_expert):
    mpq = HubMPQ.from_pretrained(str(folder), sequence_length=12, per_expert=per_expert)
    assert {op.kind for op in mpq.graph.floats if op.weight_count} == {"Llama4Router"}
    name = "model.layers.0.feed_forward.experts.gate_up_proj"
    rows = [layer for layer in mpq.graph if layer.name.startswith(name)]
    assert len(rows) == (8 if per_expert else 1)
    assert sum(layer.macs for layer in rows) == 8 * 12 * 32 * 32, (
        "all experts compute on all tokens, as in transformers"
    )
    mpq.apply_policy("W4A32", [IDS], rounding="gptq")
    want = logits(mpq.model)
    assert want.isfinite().all()
    mpq.save_pretrained(tmp_path / "packed")
    assert logits(HubMPQ.from_pretrained(tmp_path / "packed").model).equal(want)
    auto = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed").eval()
    assert torch.allclose(logits(auto), want, atol=1e-6, rtol=0)
