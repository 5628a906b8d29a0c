"""Equality with plain counting, at limits met exactly and one unit below."""

import math
import random

import pytest
from solve_oracle import optimum, random_table, with_limits

from hub_mpq.errors import InfeasibleBudget
from hub_mpq.solve import solve_table


def check(table):
    """Solve and compare; returns the Solution, None when both say infeasible."""
    best = optimum(table)
    if best is None:
        with pytest.raises(InfeasibleBudget):
            solve_table(table)
        return None
    solution = solve_table(table)
    assert solution.status == "optimal"
    assert solution.gap == 0
    # both sums are of at most a dozen floats near 1: rounding stays far below this
    assert math.isclose(solution.objective, best, rel_tol=1e-12, abs_tol=1e-12), table
    picked = {name: table["layers"][name][choice] for name, choice in solution.choices.items()}
    assert list(picked) == list(table["layers"])
    assert solution.objective == math.fsum(row["score"] for row in picked.values())
    for limit, cap in table["limits"].items():
        used = sum(row["cost"].get(limit, 0) for row in picked.values())
        assert solution.usage[limit] == used <= cap
    for tie in table["ties"]:
        assert len({solution.choices[name] for name in tie}) == 1
    return solution


def check_tight(table):
    """The table, each limit at exactly what the optimum uses, all of them there, and one unit below."""
    solution = check(table)
    if solution is None:
        return
    check(with_limits(table, **solution.usage))
    for limit, used in solution.usage.items():
        check(with_limits(table, **{limit: used}))
        if used:
            check(with_limits(table, **{limit: used - 1}))
            check(with_limits(table, **{**solution.usage, limit: used - 1}))


@pytest.mark.parametrize("block", range(10))
def test_small_tables(block):
    for seed in range(30 * block, 30 * (block + 1)):
        check_tight(random_table(seed))


@pytest.mark.parametrize("seed", range(40))
def test_a_dozen_layers(seed):
    """Large enough that the search itself decides, not the reduction before it."""
    check_tight(random_table(1000 + seed, layers=(7, 10), choices=(2, 5), kind="small" if seed % 2 else "coarse"))


def test_pairs_far_outside_the_window_are_not_needed(monkeypatch):
    monkeypatch.setattr("hub_mpq.solve.meet_in_the_middle.FEW_PAIRS", 0)
    for seed in range(6000, 6040):
        check_tight(random_table(seed, layers=(3, 6), kind="plain"))
    # both limits met by one policy only, the one of the worst scores
    layers = {
        f"l{i}": {
            "x": {"score": 9.0, "cost": {"a": 1, "b": 1}},
            "y": {"score": i, "cost": {"a": 0, "b": 2}},
            "z": {"score": i / 2, "cost": {"a": 2, "b": 0}},
        }
        for i in range(3)
    }
    assert check({"sense": "min", "layers": layers, "limits": {"a": 3, "b": 3}, "ties": []}) is not None


@pytest.mark.parametrize("block", range(4))
def test_small_tables_by_scip(block, monkeypatch):
    monkeypatch.setattr("hub_mpq.solve.half_enumeration.MAX_STATES", 0)
    for seed in range(2000 + 15 * block, 2015 + 15 * block):
        check_tight(random_table(seed))
    check_tight(random_table(3000 + block, layers=(8, 10), choices=(2, 5), kind="coarse"))


@pytest.mark.parametrize("seed", range(20))
def test_whole_numbers_beyond_2_to_the_53(seed):
    """BitOps of a large language model: the common factor of all layers keeps sums exact."""
    table = random_table(4000 + seed, layers=(6, 8), choices=(2, 4), kind="coarse")
    factor = 2048 * 4096 * 10**9 + 1
    for row in table["layers"].values():
        for choice in row.values():
            choice["cost"] = {k: v * factor for k, v in choice["cost"].items()}
    check_tight({**table, "limits": {k: v * factor for k, v in table["limits"].items()}})


@pytest.mark.parametrize("seed", range(20))
def test_fractional_costs(seed):
    """Tenths, which no float holds exactly: a limit equal to their sum is met."""
    whole = random_table(5000 + seed, layers=(3, 8), choices=(2, 4), kind="coarse")
    tenths = {
        name: {c: {**v, "cost": {k: x / 10 for k, x in v["cost"].items()}} for c, v in row.items()}
        for name, row in whole["layers"].items()
    }
    solution = solve_table({**whole, "layers": tenths, "limits": {k: v / 10 for k, v in whole["limits"].items()}})
    assert math.isclose(solution.objective, optimum(whole), rel_tol=1e-12)
    for limit, cap in whole["limits"].items():
        assert solution.usage[limit] <= cap / 10 * (1 + 1e-12)


@pytest.mark.parametrize(("layers", "limit"), [(3, 0.3), (7, 0.7), (6, 0.6)])
def test_a_sum_of_tenths_meets_its_limit(layers, limit):
    row = {"tenth": {"score": 1.0, "cost": {"ms": 0.1}}, "fifth": {"score": 0.5, "cost": {"ms": 0.2}}}
    table = {"sense": "min", "layers": {f"l{i}": row for i in range(layers)}, "limits": {"ms": limit}}
    assert set(solve_table(table).choices.values()) == {"tenth"}
    with pytest.raises(InfeasibleBudget):
        solve_table({**table, "limits": {"ms": limit - 1e-6}})


@pytest.mark.parametrize("huge", [1e20, 1e300])
def test_huge_costs_and_scores_are_numbers_like_others(huge):
    cheap = {"score": 1.0, "cost": {"ms": 1}}
    for other in ({"score": 0.5, "cost": {"ms": huge}}, {"score": huge, "cost": {"ms": 2}}):
        layers = {"a": {"x": cheap, "y": other}, "b": {"x": cheap, "y": other}}
        assert solve_table({"sense": "min", "layers": layers, "limits": {"ms": 5}}).objective == 2.0


@pytest.mark.parametrize("score", [1e-15, 1e-9, 1e9, 1e15])
@pytest.mark.parametrize("cost", [1, 10**9])
def test_scores_and_costs_of_any_scale(score, cost):
    for seed in range(8):
        table = random_table(7000 + seed, layers=(5, 6), choices=(2, 4), kind="plain")
        layers = {
            name: {
                c: {"score": v["score"] * score, "cost": {k: x * cost for k, x in v["cost"].items()}}
                for c, v in row.items()
            }
            for name, row in table["layers"].items()
        }
        scaled = {**table, "layers": layers, "limits": {k: v * cost for k, v in table["limits"].items()}}
        assert math.isclose(solve_table(scaled).objective, optimum(scaled), rel_tol=1e-12)


def test_scores_of_very_different_sizes_in_one_objective():
    rng = random.Random(1)
    for seed in range(20):
        table = random_table(8000 + seed, layers=(5, 6), choices=(3, 4), kind="plain")
        for row in table["layers"].values():
            for choice in row.values():
                choice["score"] *= 10.0 ** rng.choice([-3, 0, 10])
        assert math.isclose(solve_table(table).objective, optimum(table), rel_tol=1e-12)


def test_layers_of_equal_shape():
    """A transformer: few distinct costs, so that many part-policies coincide and are merged."""
    rng = random.Random(0)
    layers = {
        f"block{i}.{kind}": {
            str(b): {"score": rng.uniform(1, 2) * 2.0**-b, "cost": {"bytes": count * b, "wide": int(b > 4)}}
            for b in (2, 3, 4, 5, 6)
        }
        for i in range(8)
        for kind, count in (("qkv", 3), ("proj", 1), ("mlp", 4))
    }
    check_tight({"sense": "min", "layers": layers, "limits": {"bytes": 8 * 8 * 4 - 3, "wide": 9}, "ties": []})


@pytest.mark.parametrize(
    ("layers", "objective"),
    [
        ({"a": {"x": {"score": 2.0, "cost": {"k": 3}}}}, 2.0),
        ({"a": {"x": {"score": 2.0, "cost": {"k": 3}}, "y": {"score": 1.0, "cost": {"k": 4}}}}, 2.0),
        ({"a": {"x": {"score": 2.0, "cost": {}}, "y": {"score": 1.0}}}, 1.0),
        ({"a": {"x": {"score": 1.0, "cost": {"k": 0}}}, "b": {"x": {"score": 1.0, "cost": {"k": 0}}}}, 2.0),
    ],
    ids=["one choice", "one layer", "no costs", "zero costs"],
)
def test_degenerate(layers, objective):
    solution = solve_table({"sense": "min", "layers": layers, "limits": {"k": 3}})
    assert (solution.objective, solution.status) == (objective, "optimal")


def test_no_limits_and_endless_limits():
    layers = {"a": {"x": {"score": 2.0, "cost": {"k": 3}}, "y": {"score": 5.0, "cost": {"k": 7, "other": 1}}}}
    assert solve_table({"sense": "max", "layers": layers}).choices == {"a": "y"}
    solution = solve_table({"sense": "max", "layers": layers, "limits": {"k": math.inf}})
    assert (solution.choices, solution.usage) == ({"a": "y"}, {"k": 7})


def test_answer_does_not_depend_on_the_order_of_layers_or_the_start():
    table = random_table(7, layers=(9, 9), choices=(4, 5), kind="coarse")
    solution = solve_table(table)
    turned = {**table, "layers": dict(reversed(table["layers"].items()))}
    assert solve_table(turned).choices == solution.choices
    assert solve_table(table, start=solution.choices).choices == solution.choices
    assert solve_table(table).to_dict() | {"seconds": 0} == solution.to_dict() | {"seconds": 0}
