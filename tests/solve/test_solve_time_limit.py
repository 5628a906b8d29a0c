"""A time limit gives the best policy so far with a bound that holds, and never calls it optimal."""

import random

import pytest

from hub_mpq.errors import HubMPQError, InvalidArgument
from hub_mpq.solve import solve_table
from hub_mpq.solve.meet_in_the_middle import Progress
from hub_mpq.solve.scip import search_scip


def subset_sum(n, seed=0):
    """Scores that equal the costs: every bound is useless, no solver proves this quickly."""
    rng = random.Random(seed)
    rows = {}
    for i in range(n):
        pairs = [(2 * rng.randint(1, 10**8), 2 * rng.randint(1, 10**8)) for _ in range(25)]
        rows[f"layer{i}"] = {
            str(j): {"score": float(a + b), "cost": {"a": a, "b": b}} for j, (a, b) in enumerate(pairs)
        }
    half = n * 10**8 // 3
    return {"sense": "max", "layers": rows, "limits": {"a": half + half % 2 + 1, "b": half + half % 2 + 1}}


def check(solution, table):
    assert solution.status == "feasible"
    assert solution.bound > solution.objective
    gap = (solution.bound - solution.objective) / solution.bound
    assert solution.gap == pytest.approx(gap)
    assert solution.gap > 0
    # no policy can score more than the two limits together; the prices of the bound are good to about 1e-6
    assert solution.bound <= sum(table["limits"].values()) * (1 + 1e-5)
    assert all(solution.usage[k] <= cap for k, cap in table["limits"].items())


def test_the_limit_strikes_in_scip(monkeypatch):
    monkeypatch.setattr("hub_mpq.solve.half_enumeration.MAX_STATES", 1000)
    given = []

    def spied(core, dual, accept, seconds, known):
        given.append(seconds)
        search_scip(core, dual, accept, seconds, known)

    monkeypatch.setattr("hub_mpq.solve.solve.search_scip", spied)
    table = subset_sum(30)
    solution = solve_table(table, time_limit=2)
    assert len(given) == 1
    assert given[0] < 2  # what the listing has left of the limit
    check(solution, table)


def test_the_limit_strikes_at_once():
    table = subset_sum(40)
    check(solve_table(table, time_limit=1e-9), table)


def test_bound_holds_for_the_true_optimum():
    rng = random.Random(5)
    rows = {
        f"layer{i}": {
            str(j): {"score": rng.random() / (1 + j), "cost": {"k": j * rng.randint(5, 99)}} for j in range(9)
        }
        for i in range(60)
    }
    table = {"sense": "min", "layers": rows, "limits": {"k": 9000}}
    best, cut = solve_table(table), solve_table(table, time_limit=1e-9)
    assert best.status == "optimal"
    assert cut.bound <= best.objective <= cut.objective


def test_a_start_is_kept_when_nothing_better_is_found(monkeypatch):
    monkeypatch.setattr("hub_mpq.solve.solve.repair", lambda core, dual, deadline: None)
    table = subset_sum(30)
    start = {name: min(row, key=lambda c: row[c]["score"]) for name, row in table["layers"].items()}
    solution = solve_table(table, time_limit=1e-9, start=start)
    assert solution.choices == start
    check(solution, table)


def test_nothing_found_in_time_is_said(monkeypatch):
    monkeypatch.setattr("hub_mpq.solve.solve.repair", lambda core, dual, deadline: None)
    with pytest.raises(HubMPQError, match="no policy was found"):
        solve_table(subset_sum(30), time_limit=1e-9)
    # and by SCIP alone, cut off before it has a solution that could be asked for
    monkeypatch.setattr("hub_mpq.solve.solve.search", lambda *args: Progress())
    with pytest.raises(HubMPQError, match="no policy was found"):
        solve_table(subset_sum(200), time_limit=1e-9)


@pytest.mark.parametrize("limit", [0, -1, float("nan"), "1"])
def test_time_limits_that_mean_nothing(limit):
    with pytest.raises(InvalidArgument, match="time_limit"):
        solve_table(subset_sum(2), time_limit=limit)
