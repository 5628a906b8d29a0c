"""Experts that are modules in a list: those that the example does not reach are layers as the others are."""

import torch
import transformers
from torch import nn

from hub_mpq import HubMPQ
from hub_mpq.nn.calibrate import sample_inputs
from hub_mpq.nn.routed_experts import routed_experts


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return self.down(self.up(x) * self.gate(x).sigmoid())


class Routed(nn.Module):
    """Tokens go to expert 1, and to expert 2 where their first feature is above zero; expert 0 gets none."""

    def __init__(self, count="num_experts"):
        super().__init__()
        self.stem, self.head = nn.Linear(8, 8), nn.Linear(8, 4)
        self.experts = nn.ModuleList(Expert() for _ in range(3))
        setattr(self, count, 3)

    def forward(self, x):
        x = self.stem(x).flatten(0, -2)
        some = x[:, 0] > 0
        y = self.experts[1](x)
        if bool(some.any()):
            y = y.index_add(0, some.nonzero()[:, 0], self.experts[2](x[some]))
        return self.head(y)


def network(**kwargs):
    torch.manual_seed(0)
    return Routed(**kwargs).eval()


X = torch.randn(1, 24, 8, generator=torch.Generator().manual_seed(0))


def test_experts_that_the_example_does_not_reach_are_layers():
    graph = HubMPQ.from_module(network(), (X,)).graph
    for part, macs in (("up", 8 * 16), ("gate", 8 * 16), ("down", 16 * 8)):
        rows = [graph[f"experts.{i}.{part}"] for i in range(3)]
        assert len({row.macs for row in rows}) <= 2, "shares differ by rounding alone"
        assert sum(row.macs for row in rows) % macs == 0
        assert 24 * macs < sum(row.macs for row in rows) < 48 * macs, "expert 1 and a part of expert 2"
    assert graph["experts.0.gate"].activation_tie == graph["experts.0.up"].activation_tie == "experts.0.up"
    assert graph["experts.0.up"].buffer != graph["experts.1.up"].buffer
    assert not [op for op in graph.floats if op.weight_count]


def test_a_list_that_says_nothing_of_experts_stays_as_it_ran():
    net = network(count="depth")
    assert routed_experts(net) == []
    names = HubMPQ.from_module(net, (X,)).graph.names
    assert "experts.1.up" in names
    assert "experts.0.up" not in names


def test_an_expert_without_tokens_is_calibrated_on_what_the_others_read():
    mpq = HubMPQ.from_module(network(), (X,)).apply_policy("W4A8", [X])
    samples = sample_inputs(mpq.model, [X], lambda net, x: net(x))
    assert samples["experts.0.up"].equal(torch.cat([samples["experts.1.up"], samples["experts.2.up"]]))
    scale, reached = (mpq.model.experts[i].up.input_quantizer.scale.detach().flatten()[0] for i in (0, 1))
    assert 0.5 < float(scale / reached) < 2, "not the scale that a quantizer has at its start"
    assert mpq.model.experts[0](X).isfinite().all()


def test_a_dropout_in_the_list_is_no_expert():
    """NLLB-MoE."""
    net = network()
    net.experts = nn.ModuleDict({"0": net.experts[0], "1": net.experts[1], "2": net.experts[2], "drop": nn.Dropout()})
    assert [set(rows) for rows in routed_experts(net)] == [{"0", "1", "2"}] * 3


def test_all_weights_of_switch_transformers_are_quantized(tmp_path):
    config = transformers.SwitchTransformersConfig(
        **{"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_decoder_layers": 2},
        **{"num_heads": 2, "num_experts": 8, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    )
    torch.manual_seed(0)
    transformers.SwitchTransformersForConditionalGeneration(config).save_pretrained(tmp_path / "float")
    mpq = HubMPQ.from_pretrained(str(tmp_path / "float"), sequence_length=8)
    assert not [op for op in mpq.graph.floats if op.weight_count]
    experts = [layer for layer in mpq.graph if "expert_" in layer.name]
    assert len(experts) == 2 * 2 * 8
    mpq.apply_policy("W4A8")
    mpq.save_pretrained(tmp_path / "packed")
    again = HubMPQ.from_pretrained(str(tmp_path / "packed"))
    with torch.no_grad():
        assert torch.equal(again(**mpq.source.example).logits, mpq(**mpq.source.example).logits)
