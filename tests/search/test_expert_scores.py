"""Scores of stacked experts: each stack is one layer, whose error at a token is that of all experts it reaches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from hub_mpq import HubMPQ
from hub_mpq.nn.calibrate import calibrate_weights, widths_off
from hub_mpq.nn.quantize import quantize_with_lsq
from hub_mpq.search.sensitivity import at, sensitivity
from hub_mpq.tasks import task_of

LAST = "model.layers.1.mlp.experts"
WIDTHS = (4, 6, 8)


def moe(experts: int = 4, top: int = 2, tokens: int = 16, samples: int = 32) -> tuple[HubMPQ, dict[str, torch.Tensor]]:
    import transformers

    config = transformers.MixtralConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=16,
        num_local_experts=experts,
        num_experts_per_tok=top,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = transformers.MixtralForCausalLM(config).eval()
        for parameter in net.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.25)
        ids = torch.randint(48, (samples, tokens))
    return HubMPQ.from_module(net, {"input_ids": ids[:1]}), {"input_ids": ids}


def quantized(mpq: HubMPQ, names: list[str]) -> tuple[Any, dict[str, Any]]:
    """The network with quantizers in some layers, and those layers."""
    net = mpq.float_model
    layers = quantize_with_lsq(net, mpq.graph, dict.fromkeys(names, (WIDTHS, ())), per_channel=True)
    calibrate_weights(net, mse=True)
    return net, layers


@pytest.mark.parametrize("top", [1, 2, 4])
def test_it_is_the_squared_error_of_the_whole_stack_at_each_token(top):
    """Whatever rows the experts' calls have, and however many they are: to rounding errors."""
    name = f"{LAST}.down_proj"
    mpq, batch = moe(top=top, samples=8)
    net, layers = quantized(mpq, [name])
    task = task_of(None, net, batch)
    seen: dict[str, Any] = {}

    def keep(module: Any, args: Any, output: torch.Tensor) -> None:
        output.retain_grad()
        seen.update(module=module, args=[x.detach() for x in args], output=output)

    with widths_off(net):
        found = sensitivity(layers, net, [batch], task, seed=3)
        handle = net.get_submodule(LAST).register_forward_hook(keep)
        output = task.forward(net, batch)
        values, kept = task.probe(output, torch.Generator().manual_seed(3), task.mask(batch))
        torch.where(kept, values, 0.0).sum().backward()
        handle.remove()
        for bits in WIDTHS:
            with at(layers[name].weight_quantizer, bits), torch.no_grad():
                moved = seen["module"](*seen["args"])
            error = (seen["output"].grad * (moved - seen["output"].detach())).sum(-1)
            wanted = float(error.square().sum() / kept.sum())
            assert found.weight[name][bits] == pytest.approx(wanted, rel=1e-3)
    assert 0 < found.weight_error[name][4] < found.weight[name][4]


@pytest.mark.parametrize("stack", ["gate_up_proj", "down_proj"])
def test_it_is_the_divergence_that_quantizing_the_stack_causes(stack):
    """The Kullback-Leibler divergence, measured by quantizing the stack of the last block alone."""
    name = f"{LAST}.{stack}"
    mpq, batch = moe(samples=64)
    net, layers = quantized(mpq, [name])
    task = task_of(None, net, batch)
    batches = [{"input_ids": part} for part in batch["input_ids"].split(16)]
    with widths_off(net):
        found = sensitivity(layers, net, batches, task)
        for bits in (6, 8):
            total = count = 0.0
            for part in batches:
                with torch.no_grad():
                    plain = task.forward(net, part)
                    with at(layers[name].weight_quantizer, bits):
                        moved = task.forward(net, part)
                values, _ = task.divergence(moved, plain)
                total, count = total + float(values.double().sum()), count + values.numel()
            assert found.weight[name][bits] == pytest.approx(total / count, rel=0.2)
    assert found.unit == "kl"


@pytest.mark.parametrize("strategy", ["limpq", "mse", "kl", "gradient", "hessian"])
def test_every_scorer_scores_stacks(strategy):
    mpq, batch = moe(samples=4)
    mpq = HubMPQ(replace(mpq.source), weight_only=True)
    scores = mpq.train_scores([{**batch, "labels": batch["input_ids"]}], strategy=strategy, steps=0, candidates=(2, 4))
    for layer in mpq.graph.searched:
        row = mpq.score_table()[0][layer.name]
        assert len(row) == 2
        assert all(torch.isfinite(torch.tensor(score)) for score in row.values())
    assert scores.strategy == strategy
    result = mpq.search(size="W3")
    assert {bits.activation for name, bits in result.policy.bits.items() if ".experts." in name} == {32}


@pytest.mark.parametrize("strategy", ["dq", "ebs", "bsq"])
def test_strategies_that_train_search_stacks_beside_other_layers(strategy):
    """Inputs of the other layers are searched too; those of experts stay float."""
    mpq, batch = moe(samples=8)
    data = [{"input_ids": ids, "labels": ids} for ids in batch["input_ids"]]
    mpq.train_scores(
        DataLoader(data, batch_size=2),
        strategy=strategy,
        steps=2,
        candidates=(2, 4),
        budget={"size": "W3"},
    )
    if strategy in ("dq", "bsq"):
        assert mpq.scores is not None
        assert mpq.scores.inferred is not None
        bits = mpq.scores.inferred
    else:
        bits = mpq.search(size="W3").policy.bits
    assert {level.activation for name, level in bits.items() if ".experts." in name} == {32}
