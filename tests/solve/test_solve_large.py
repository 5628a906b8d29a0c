"""Tables of 100,000 layers, and of 100,000 choices of one layer, cost the time limit and 20 s of CPU at most."""

import math
import random
import time

import numpy as np
import pytest

from hub_mpq.errors import InvalidArgument
from hub_mpq.solve import solve_table
from hub_mpq.solve.incumbent import repair
from hub_mpq.solve.lagrangian import solve_dual
from hub_mpq.solve.reduce import MAX_WIDTH, _dominated, _dominated_in_row, reduce
from hub_mpq.solve.table import parse

LIMIT, CPU = 5, 20


def row(score, **cost):
    return {"score": score, "cost": cost}


def alike(n):
    """All layers the same: whole sets of policies cost the same."""
    layers = {f"l{i}": {"x": row(1, b=2), "y": row(2, b=1)} for i in range(n)}
    return {"sense": "min", "layers": layers, "limits": {"b": n * 3 // 2}}


def drawn(n, choices, limits, part, seed=0):
    """No two choices alike, hardly one that another dominates."""
    rng = random.Random(seed)
    layers = {
        f"l{i}": {str(j): row(rng.random(), **{f"b{d}": rng.randint(1, 10**6) for d in range(limits)}) for j in choices}
        for i in range(n)
    }
    return {"sense": "max", "layers": layers, "limits": {f"b{d}": int(n * 10**6 * part) for d in range(limits)}}


def subset_sum(n, choices, part):
    """Scores that equal the costs: every bound is useless."""
    rng = random.Random(1)
    layers = {}
    for i in range(n):
        pairs = [(2 * rng.randint(1, 10**8), 2 * rng.randint(1, 10**8)) for _ in range(choices)]
        layers[f"l{i}"] = {str(j): row(float(a + b), a=a, b=b) for j, (a, b) in enumerate(pairs)}
    cap = 2 * int(n * 10**8 * part / 2) + 1
    return {"sense": "max", "layers": layers, "limits": {"a": cap, "b": cap}}


def check(table, solution):
    assert all(solution.usage[name] <= cap for name, cap in table["limits"].items())
    assert set(solution.choices) == set(table["layers"])
    if solution.status == "optimal":
        assert solution.gap == 0
    else:
        assert solution.bound > solution.objective


@pytest.mark.parametrize(
    "make",
    [
        lambda: drawn(100_000, "xy", 1, 0.45),
        lambda: drawn(100_000, "xy", 2, 0.48),
        lambda: drawn(2, range(100_000), 2, 0.3),
        lambda: subset_sum(3, 100_000, 1 / 3),
        lambda: subset_sum(100_000, 2, 0.9),
        lambda: subset_sum(4_000, 25, 1 / 3),
    ],
    ids=["layers", "layers, two limits", "choices", "choices, sums", "layers, sums", "both, sums"],
)
def test_the_time_limit_holds(make):
    table = make()
    began = time.process_time()
    solution = solve_table(table, time_limit=LIMIT)
    assert time.process_time() - began < CPU
    check(table, solution)


def test_layers_alike_are_solved_without_a_limit():
    table = alike(100_000)
    began = time.process_time()
    solution = solve_table(table)
    assert time.process_time() - began < CPU
    assert (solution.status, solution.objective, solution.usage["b"]) == ("optimal", 150_000, 150_000)


@pytest.mark.parametrize("turned", [False, True])
def test_a_chain_of_ties_is_one_row(turned):
    n = 20_000
    ties = [[f"l{i}", f"l{i + 1}"][:: -1 if turned else 1] for i in range(n - 1)]
    began = time.process_time()
    for order in (ties, ties[::-1]):
        solution = solve_table({**alike(n), "ties": order})
        assert set(solution.choices.values()) == {"y"}  # x of all would cost 2 n
    assert time.process_time() - began < CPU


def test_ties_name_the_layers_of_one_row_in_the_order_of_the_table():
    table = {**alike(7), "ties": [["l5", "l1"], ["l6", "l5"], ["l3", "l2"]]}
    assert parse(table).names == [("l0",), ("l1", "l5", "l6"), ("l2", "l3"), ("l4",)]


def test_a_table_too_large_for_arrays_is_refused():
    """One layer of 20,000 choices makes all rows so long."""
    table = alike(20_000)
    table["layers"]["wide"] = {str(j): row(j, b=1) for j in range(20_000)}
    with pytest.raises(InvalidArgument, match="20001 rows of up to 20000 choices and 1 limits"):
        solve_table(table)


@pytest.mark.parametrize("m", [0, 1, 2, 3])
def test_long_rows_lose_dominated_choices_only(m):
    """Against the comparison of all pairs; with two and more limits some may stay."""
    rng = np.random.default_rng(m)
    for k in (2, 50, MAX_WIDTH):
        values = rng.integers(0, 30 if k > 2 else 2, (1 + m, k)).astype(float)
        short = _dominated(values[0][None], values[1:, None], np.ones((1, k), dtype=bool), math.inf)[0]
        if m:
            found = _dominated_in_row(values)
            assert (found <= short).all()
            assert m > 1 or (found == short).all()
        kept = values[:, ~short]
        assert all((kept <= column[:, None]).all(0).any() for column in values.T)


def test_a_first_policy_of_many_layers_takes_few_steps():
    table = drawn(2_000, "wxyz", 2, 0.4)
    core = reduce(parse(table))
    dual = solve_dual(core)
    choice = repair(core, dual)
    rows = np.arange(len(choice))
    assert (core.cost[:, rows, choice].sum(1) <= core.caps).all()
    above = dual.reduced[rows, choice].sum() + dual.prices @ (core.caps - core.cost[:, rows, choice].sum(1))
    assert above < 1e-3 * core.score[np.isfinite(core.score)].sum()


# numbers at the ends of what floats are


def test_tiny_scores_and_costs_are_numbers_like_others():
    tiny = 5e-324
    layers = {n: {"x": row(0.0, b=2 * tiny), "y": row(tiny, b=tiny), "z": row(3 * tiny, b=0.0)} for n in "abc"}
    solution = solve_table({"sense": "min", "layers": layers, "limits": {"b": 3 * tiny}})
    assert solution.status == "optimal"
    assert solution.objective == 3 * tiny
    assert solution.usage["b"] <= 3 * tiny


@pytest.mark.parametrize("limit", [math.inf, 10**400, 1.7e308])
def test_a_limit_that_nothing_reaches_binds_nothing(limit):
    table = {**alike(5), "limits": {"b": limit}}
    assert solve_table(table).objective == 5


@pytest.mark.parametrize("sense", ["min", "max"])
def test_sums_beyond_floats_are_refused(sense):
    for layers in ({"a": {"x": row(1e308, b=1)}, "b": {"x": row(1e308, b=1)}}, {"a": {"x": row(1, b=1e308)}}):
        with pytest.raises(InvalidArgument, match="could add up to more than 1e\\+305; divide them"):
            solve_table({"sense": sense, "layers": layers, "limits": {"b": 1.7e308}})


@pytest.mark.parametrize("ties", [5, "ab", {"a": "b"}, True, [5], [None], ["ab"], [{"a": 1}], [["l0", ["l1"]]]])
def test_ties_that_are_none_are_refused(ties):
    with pytest.raises(InvalidArgument, match="tie"):
        solve_table({**alike(2), "ties": ties})
