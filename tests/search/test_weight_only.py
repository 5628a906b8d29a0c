"""Weights alone, and layers that read one input at one width."""

import itertools

import pytest
import torch

from hub_mpq import Candidates, HubMPQ, LayerBits
from hub_mpq.errors import InvalidArgument


class Attention(torch.nn.Module):
    """Three projections of one input, behind a first layer and before a last one."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = torch.nn.Linear(6, 8), torch.nn.Linear(8, 3)
        self.block = torch.nn.ModuleDict({k: torch.nn.Linear(8, 8) for k in "qkv"})
        self.out = torch.nn.Linear(8, 8)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        q, k, v = (self.block[name](x) for name in "qkv")
        return self.head(self.out(q * k.sigmoid() + v))


@pytest.fixture
def made():
    def make(**options):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net, x = Attention(), torch.randn(16, 6)
        return HubMPQ.from_module(net, x[:1], **options), x

    return make


def test_weight_only_searches_weights_and_leaves_all_inputs_float(made):
    mpq, x = made(weight_only=True)
    mpq.quantize(train=[x], weight_bits=3, candidates=[2, 3, 4], indicator_options={"steps": 2}, steps=1)
    assert {bits.activation for bits in mpq.policy.bits.values()} == {32}
    assert mpq.usage()["weight_bits"] <= 3
    assert mpq.policy.bits["head"] == LayerBits(8, 32), "pinned layers too"
    assert not mpq.indicators.activation
    again, _ = made(weight_only=True)
    trained, _ = made()
    again.scores = trained.train_indicators([x], steps=0)  # activations were learned too: they are not looked at
    assert {b.activation for b in again.search(size="W3").policy.bits.values()} == {32}
    again.train_scores([x], strategy="mse", candidates=[2, 3, 4])
    assert {b.activation for b in again.search(weight_bits=3).policy.bits.values()} == {32}
    with pytest.raises(InvalidArgument, match="for weights alone use limpq"):
        again.train_scores([x], strategy="dq")


def test_float_inputs_are_all_or_none():
    assert Candidates((2, 3), (32,)).float_inputs
    assert not Candidates((2, 3)).float_inputs
    with pytest.raises(InvalidArgument):
        Candidates((2, 3), (8, 32))
    with pytest.raises(InvalidArgument):
        Candidates((32,), (8,))


@pytest.mark.parametrize("weight_only", [True, False])
def test_tied_search_is_the_best_of_all_tied_policies(made, weight_only):
    mpq, x = made(weight_only=weight_only, tie_fused=True)
    mpq.train_indicators([x], candidates=[2, 3, 4], steps=0)
    # scores that pull the three apart
    rows = mpq.indicators.weight
    for name, factor in (("block.q", 50.0), ("block.k", 0.02), ("block.v", 1.0)):
        rows[name].update({b: s * factor for b, s in rows[name].items()})
    budget, level = ({"weight_bits": 3}, "W3") if weight_only else ({"bitops": "W3A3"}, "W3A3")
    free, _ = made(weight_only=weight_only)
    free.scores = mpq.indicators
    loose = free.search(**budget)
    assert len({loose.policy.bits[f"block.{k}"].weight for k in "qkv"}) > 1, "the tie would say nothing"
    found = mpq.search(**budget)
    assert len({found.policy.bits[f"block.{k}"] for k in "qkv"}) == 1
    assert found.objective >= loose.objective
    scores, _ = mpq.score_table()
    limit, cap = next(iter(budget)), mpq.usage(level)
    best = min(
        sum(scores[n][b] for n, b in bits.items())
        for fused, out in itertools.product(scores["block.q"], scores["out"])
        for bits in [{"block.q": fused, "block.k": fused, "block.v": fused, "out": out}]
        if all(b in scores[n] for n, b in bits.items()) and _usage(mpq, bits)[limit] <= cap[limit]
    )
    assert found.objective == pytest.approx(best, rel=1e-9)


def _usage(mpq, bits):
    from hub_mpq import Policy

    fixed = {x.name: x.fixed for x in mpq.graph if x.fixed is not None}
    return mpq.usage(Policy({**fixed, **bits}, mpq.graph.digest))


def test_ties_and_pins_must_agree(made):
    with pytest.raises(InvalidArgument, match="pinned differently"):
        made(fixed={"block.q": "W8A8"}, tie_fused=True)
    mpq, _ = made(fixed={"block.*": "W8A8"}, tie_fused=True)
    assert {mpq.graph[f"block.{k}"].tie for k in "qkv"} == {"block.q"}
