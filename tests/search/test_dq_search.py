"""DQ as a strategy: ties without a budget, soft constraints told as such, starts, options, and soft costs."""

import copy
import warnings

import pytest
import torch
from torch import nn

from hub_mpq import HubMPQ
from hub_mpq.errors import InvalidArgument
from hub_mpq.search.candidates import resolve_candidates
from hub_mpq.search.dq import DQSearch

X = torch.zeros(1, 1, 8, 8)


class Chain(nn.Module):
    """q and k read one input; r, which reads another one, shares k's Parameter."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.r = (nn.Linear(8, 8, bias=False) for _ in range(3))
        self.r.weight = self.k.weight

    def forward(self, x):
        return self.r(torch.relu(self.q(x) * self.k(x)))


def test_ties_that_hang_together_take_one_width(monkeypatch):
    plain = DQSearch.inferred

    def known(self, model):
        for name, layer in self.layers.items():
            layer.input_quantizer.init(6 if name == "1.r" else 2, 1.0)
        return plain(self, model)

    monkeypatch.setattr(DQSearch, "inferred", known)
    net = nn.Sequential(nn.Linear(8, 8), Chain(), nn.Linear(8, 5)).eval()
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    mpq = HubMPQ.from_module(net, x[:1])
    mpq.quantize(strategy="dq", train=[(x, torch.arange(16) % 5)], steps=1, indicator_options={"steps": 1})
    assert {mpq.policy.bits[f"1.{name}"].activation for name in "qkr"} == {6}


def test_widths_over_a_byte_constraint_come_with_a_warning(net, train):
    mpq = HubMPQ.from_module(net, X)
    with pytest.warns(UserWarning, match="exceed the soft constraint weight_bytes=1;") as caught:
        mpq.train_scores(train, strategy="dq", strategy_options={"weight_bytes": 1}, steps=1)
    assert len([w for w in caught if "soft constraint" in str(w.message)]) == 1
    options = {"activation_bytes": 1, "activation": "sum"}
    with pytest.warns(UserWarning, match="exceed the soft constraint activation_bytes=1;"):
        mpq.train_scores(train, strategy="dq", strategy_options=options, steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mpq.train_scores(train, strategy="dq", strategy_options={"weight_bytes": "1MB"}, steps=1)


def test_a_byte_constraint_beside_a_budget_is_told_to_be_none(net, train):
    mpq = HubMPQ.from_module(net, X)
    options = {"strategy": "dq", "steps": 1, "budget": {"bitops": "W6A6"}}
    with pytest.warns(UserWarning, match="the policy meets the budget alone") as caught:
        mpq.train_scores(train, strategy_options={"weight_bytes": 669.6}, **options)
    assert len([w for w in caught if issubclass(w.category, UserWarning)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mpq.train_scores(train, **options)


@pytest.mark.parametrize(("start", "bits"), [(6, 6), (5, 5), (None, 4)])
def test_a_start_on_the_power_of_two_grid_is_the_one_asked_for(net, start, bits):
    mpq = HubMPQ.from_module(net, X)
    dq = DQSearch(grid="power-of-two", start=start)
    dq.attach(copy.deepcopy(net), mpq.graph, resolve_candidates(mpq.graph, None), {})
    dq.calibrate(net, [], {})
    assert {int(q.width().detach()) for q in dq.quantizers} == {bits}


@pytest.mark.parametrize("parametrization", ["step-range", "bits-step", "bits-range"])
def test_eight_bits_on_the_power_of_two_grid_train(net, train, parametrization):
    mpq = HubMPQ.from_module(net, X)
    options = {"grid": "power-of-two", "parametrization": parametrization}
    found = mpq.train_scores(train, strategy="dq", strategy_options=options, candidates=[8], steps=2)
    assert set(found.provenance["inferred"].values()) == {"W8A8"}


def test_a_cost_of_the_users_may_have_any_name(net, train):
    mpq = HubMPQ.from_module(net, X)
    table = {x.name: {f"W{w}A{a}": 1.0 for w in range(2, 7) for a in range(2, 7)} for x in mpq.graph.searched}
    for strategy in ("dq", "bsq", "ebs"):
        for name in ("inputs", "limits", "amount"):
            budget = {"bitops": "W4A4", "costs": {name: (9.0, table)}}
            found = mpq.train_scores(train, strategy=strategy, steps=1, budget=budget)
            assert set(found.provenance.get("reached", {"bitops"})) == {"bitops"}


@pytest.mark.parametrize("name", ["size", "activation_peak", "bitops"])
def test_a_cost_of_the_users_may_not_have_the_name_of_a_limit(net, train, name):
    """Also where that limit is not given: a penalty would read it as bytes of the file."""
    mpq = HubMPQ.from_module(net, X)
    row = {f"W{w}A{a}": 1.0 for w in range(2, 7) for a in range(2, 7)}
    table = {x.name: row for x in mpq.graph.searched}
    with pytest.raises(InvalidArgument, match="name of a limit"):
        mpq.train_scores(train, strategy="dq", steps=1, budget={"weight_bits": 4, "costs": {name: (9.0, table)}})


def test_every_step_ends_within_the_candidates(net):
    mpq = HubMPQ.from_module(net, X)
    dq = DQSearch()
    dq.attach(copy.deepcopy(net), mpq.graph, resolve_candidates(mpq.graph, [3, 4]), {})
    dq.calibrate(net, [], {})
    for factor, bits in ((100.0, 4), (1e-4, 3)):
        with torch.no_grad():
            for q in dq.quantizers:
                q.range.mul_(factor)
        dq.after_step(net, 0)
        assert {int(q.width().detach()) for q in dq.quantizers} == {bits}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"start": "abc"}, "start must be an integer from 1 to 8, got 'abc'"),
        ({"start": 0}, "start .* got 0"),
        ({"start": 20}, "start .* got 20"),
        ({"strength": "high"}, "strength must be a finite number of at least 0, got 'high'"),
        ({"strength": -1.0}, "strength .* got -1"),
        ({"strength": float("nan")}, "strength .* got nan"),
        ({"power_of_two_step": "yes"}, "power_of_two_step must be a bool, got 'yes'"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, match):
    with pytest.raises(InvalidArgument, match=match):
        DQSearch(**options)
