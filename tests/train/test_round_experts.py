"""Stacks of experts, rounded by what reaches each expert."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

from hub_mpq import HubMPQ, Policy
from hub_mpq.core import LayerBits
from hub_mpq.nn.rounded_weights import StoredWeight
from hub_mpq.quantizers.gptq import Factor
from hub_mpq.quantizers.weight_grid import WeightGrid, weight_grid
from hub_mpq.train.round_weights import round_weights

NAMES = [f"model.layers.{i}.mlp.experts.{name}" for i in (0, 1) for name in ("gate_up_proj", "down_proj")]


def moe(family: str) -> tuple[Any, dict[str, torch.Tensor]]:
    import transformers

    config = getattr(transformers, f"{family}Config")(
        **{"vocab_size": 96, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "head_dim": 16},
        **{"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32},
        **{"num_local_experts": 4, "num_experts_per_tok": 2},
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = getattr(transformers, f"{family}ForCausalLM")(config).eval()
        for parameter in net.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.25)
        ids = torch.randint(96, (16, 32))
    return net, {"input_ids": ids}


@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
@pytest.mark.parametrize("choice", [LayerBits(3, 32), LayerBits(3, 32, 16, False)], ids=str)
def test_each_expert_is_rounded_by_gptq_on_its_own_tokens(family, choice):
    net, batch = moe(family)
    mpq = HubMPQ.from_module(net, {"input_ids": batch["input_ids"][:1]})
    name = NAMES[0]
    rows: dict[int, list[torch.Tensor]] = {}
    stack = mpq.model.get_submodule(name)
    handle = stack.register_forward_pre_hook(lambda _m, args: rows.setdefault(args[1], []).append(args[0]))
    with torch.no_grad():
        mpq.model(**batch)
    handle.remove()
    rounded = round_weights(mpq.float_model, mpq.graph, {name: (choice,)}, [batch])
    packed = rounded.packed(name, choice)
    for expert, x in rows.items():
        h = torch.cat(x).t() @ torch.cat(x) / len(torch.cat(x))
        w = stack.weight[expert].detach()
        w = w.t() if family == "GptOss" else w
        scale, zero = weight_grid(
            w, 3, group_size=choice.group_size, symmetric=choice.symmetric, importance=h.diagonal()
        )
        grid = WeightGrid(3, scale, zero, choice.group_size)
        (wanted,) = Factor(h).round(w, [grid])
        found = packed.unpack()[expert]
        found = found.t() if family == "GptOss" else found
        assert (found != wanted).float().mean() < 0.01  # sums in another order
        error = grid.dequantize(found) - w
        nearest = grid.dequantize(grid.nearest(w)) - w
        assert float(((error @ h) * error).sum()) < 0.8 * float(((nearest @ h) * nearest).sum())


def test_compensated_experts_are_nearer_to_the_float_model():
    net, batch = moe("Mixtral")
    mpq = HubMPQ.from_module(net, {"input_ids": batch["input_ids"][:1]}, weight_only=True)
    with torch.no_grad():
        wanted = net(**batch).logits
        found = {}
        for rounding in ("nearest", "gptq"):
            mpq.apply_policy("W3", [batch], rounding=rounding)
            found[rounding] = float((mpq.model(**batch).logits - wanted).square().mean())
    assert found["gptq"] < found["nearest"]


def test_experts_that_no_token_reaches_are_told(caplog, tmp_path):
    net, batch = moe("Mixtral")
    mpq = HubMPQ.from_module(net, {"input_ids": batch["input_ids"][:1]})
    few = {"input_ids": batch["input_ids"][:1, :1]}  # one token reaches two of four experts
    of = mpq.float_model, mpq.graph, {name: (LayerBits(4, 32),) for name in NAMES}, [few]
    for resume in (False, True):  # also of layers that were rounded before an interruption
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            rounded = round_weights(*of, folder=tmp_path, resume=resume)
        assert rounded.unreached == dict.fromkeys(NAMES, 2)
        assert "the batches have no tokens for 8 expert matrices" in caplog.text


def test_a_stack_is_read_from_the_disk_once_for_all_its_experts(monkeypatch):
    net, batch = moe("Mixtral")
    mpq = HubMPQ.from_module(net, {"input_ids": batch["input_ids"][:1]})
    choice = LayerBits(4, 32)
    rounded = round_weights(mpq.float_model, mpq.graph, dict.fromkeys(NAMES, (choice,)), [batch])
    reads: list[str] = []
    packed = type(rounded).packed
    monkeypatch.setattr(
        type(rounded), "packed", lambda self, name, bits: reads.append(name) or packed(self, name, bits)
    )
    stored = {name: StoredWeight(rounded, name, [choice]) for name in NAMES}
    for q in stored.values():
        q.set_width(choice)
    for first, second in (NAMES[:2], NAMES[2:]):
        for expert in range(4):
            for name in (first, second):
                weight = mpq.float_model.get_submodule(name).weight.detach()
                one = stored[name].of_matrix(weight, expert)
                assert torch.equal(one, packed(rounded, name, choice).dequantize()[expert])
    assert reads == NAMES
    assert len(rounded._held) <= 2


def test_a_policy_of_stacks_goes_through_the_whole_route():
    """Scores on rounded weights, a search, and the policy's own weights."""
    net, batch = moe("Mixtral")
    mpq = HubMPQ.from_module(net, {"input_ids": batch["input_ids"][:1]}, weight_only=True)
    data = [{**batch, "labels": batch["input_ids"]}]
    mpq.quantize(size="W3", train=data, epochs=0, candidates=(2, 4), rounding="gptq")
    assert isinstance(mpq.policy, Policy)
    assert {name for name in mpq.policy.bits if ".experts." in name} == set(NAMES)
