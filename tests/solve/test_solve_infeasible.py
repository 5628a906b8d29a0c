"""Budgets that nothing meets: said, with the least reachable value of every limit."""

import random

import pytest

from hub_mpq.errors import InfeasibleBudget
from hub_mpq.solve import solve_table


def layers(*costs):
    """One layer per list of (cost of limit a, cost of limit b); scores fall as costs rise."""
    return {
        f"layer{i}": {str(j): {"score": float(-a - b), "cost": {"a": a, "b": b}} for j, (a, b) in enumerate(row)}
        for i, row in enumerate(costs)
    }


def test_one_limit_below_the_least():
    table = {"sense": "min", "layers": layers([(3, 9), (5, 1)], [(4, 4), (2, 7)]), "limits": {"a": 4, "b": 20}}
    with pytest.raises(InfeasibleBudget) as caught:
        solve_table(table)
    assert caught.value.least == {"a": 5, "b": 5}
    assert caught.value.binding == ["a"]
    assert caught.value.limits == {"a": 4, "b": 20}


def test_least_counts_ties_and_missing_choices():
    rows = layers([(3, 9), (5, 1)], [(4, 4), (2, 7)], [(1, 1), (9, 9)])
    del rows["layer2"]["0"]
    table = {"sense": "max", "layers": rows, "limits": {"a": 15, "b": 100}, "ties": [["layer0", "layer1"]]}
    with pytest.raises(InfeasibleBudget) as caught:
        solve_table(table)
    assert caught.value.least == {"a": 16, "b": 17}
    assert caught.value.binding == ["a"]


def test_both_limits_below_the_least():
    with pytest.raises(InfeasibleBudget) as caught:
        solve_table({"sense": "min", "layers": layers([(3, 9), (5, 4)]), "limits": {"a": 2, "b": 3}})
    assert caught.value.binding == ["a", "b"]


@pytest.mark.parametrize("engine", ["listing", "scip"])
def test_each_reachable_alone_but_not_together(engine, monkeypatch):
    if engine == "scip":
        monkeypatch.setattr("hub_mpq.solve.half_enumeration.MAX_STATES", 0)
    # every choice costs 10 in all, two layers: 20 is the least sum of both limits, and only even splits exist
    table = {"sense": "min", "layers": layers(*[[(2 * i, 10 - 2 * i) for i in range(6)]] * 2), "limits": {}}
    for a, b, met in [(10, 10, True), (9, 11, False), (11, 9, False), (4, 16, True), (9, 10, False), (0, 0, False)]:
        table["limits"] = {"a": a, "b": b}
        if met:
            assert solve_table(table).usage == {"a": a, "b": b}
            continue
        with pytest.raises(InfeasibleBudget) as caught:
            solve_table(table)
        assert caught.value.binding == []
        assert caught.value.least == {"a": 0, "b": 0}


@pytest.mark.parametrize("engine", ["listing", "scip"])
def test_only_the_search_can_tell(engine, monkeypatch):
    """Sums of 3 and 5 never make 7: neither a single layer nor linear programming sees it."""
    if engine == "scip":
        monkeypatch.setattr("hub_mpq.solve.half_enumeration.MAX_STATES", 0)
    table = {"sense": "min", "layers": layers(*[[(0, 10), (3, 7), (5, 5)]] * 3), "limits": {"a": 7, "b": 23}}
    with pytest.raises(InfeasibleBudget, match="not all together"):
        solve_table(table)
    assert solve_table({**table, "limits": {"a": 8, "b": 22}}).usage == {"a": 8, "b": 22}


@pytest.mark.parametrize("short", [0.9, 0.999, 1.0])
def test_many_layers_that_clash(short):
    """The two costs of a choice add up to 1000: below 1000 a layer in all, the prices alone prove it impossible."""
    rng = random.Random(3)
    rows = {}
    for i in range(60):
        costs = [rng.randint(1, 999) for _ in range(12)]
        rows[f"layer{i}"] = {str(c): {"score": rng.random(), "cost": {"a": c, "b": 1000 - c}} for c in costs}
    table = {"sense": "min", "layers": rows, "limits": {"a": int(30_000 * short), "b": int(30_000 * short)}}
    if short == 1.0:
        assert solve_table(table).usage == {"a": 30_000, "b": 30_000}
        return
    with pytest.raises(InfeasibleBudget, match="not all together"):
        solve_table(table)


def test_whole_number_beyond_float_just_below():
    huge = 2**60 + 1
    table = {"sense": "min", "layers": {"a": {"x": {"score": 1.0, "cost": {"k": huge}}}}, "limits": {"k": huge}}
    assert solve_table(table).usage == {"k": huge}
    with pytest.raises(InfeasibleBudget):
        solve_table({**table, "limits": {"k": huge - 1}})
