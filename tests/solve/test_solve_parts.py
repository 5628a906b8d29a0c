"""The parts, each on its own promise."""

import itertools
import math
import random

import numpy as np
import pytest
from solve_oracle import optimum, random_table

from hub_mpq.solve.half_enumeration import Half, Work, list_halves
from hub_mpq.solve.incumbent import repair
from hub_mpq.solve.lagrangian import Dual, solve_dual
from hub_mpq.solve.meet_in_the_middle import Progress, _join
from hub_mpq.solve.pair_join import Pairs
from hub_mpq.solve.reduce import Core, reduce
from hub_mpq.solve.table import parse


def cores(count, **shape):
    for seed in itertools.count():
        table = random_table(seed, kind="plain", **shape)
        core = reduce(parse(table))
        if len(core.rows) > 1:
            yield table, core
            count -= 1
        if not count:
            return


def test_the_dual_bound_is_below_every_policy_and_reduced_costs_are_exact():
    for table, core in cores(40, layers=(3, 4), choices=(2, 4)):
        dual = solve_dual(core)
        sign = 1 if table["sense"] == "min" else -1
        assert dual.bound * core.unit + core.offset <= sign * optimum(table) + 1e-9
        assert (dual.prices >= 0).all()
        assert dual.reduced.min() >= 0
        rows = np.arange(len(core.rows))
        for choice in itertools.product(*(np.flatnonzero(np.isfinite(row)) for row in core.score)):
            pick = np.array(choice)
            slack = core.caps - core.cost[:, rows, pick].sum(1)
            above = dual.reduced[rows, pick].sum() + dual.prices @ slack
            assert core.score[rows, pick].sum() == pytest.approx(dual.bound + above, abs=1e-9)


def test_the_dual_bound_is_the_bound_of_linear_programming():
    """Against HiGHS' relaxation where scipy is there: prices are good, not only valid."""
    from scipy.optimize import linprog

    rng = random.Random(1)
    for seed in range(5):
        rows = {
            f"layer{i}": {
                f"{w}{a}": {
                    "score": (2.0**-w + 2.0**-a) * size * rng.uniform(0.9, 1.1),
                    "cost": {"bitops": int(1000 * size * w * a), "bytes": int(100 * w / size)},
                }
                for w in range(2, 7)
                for a in range(2, 7)
            }
            for i in range(40)
            for size in [rng.uniform(0.3, 3)]
        }
        table = {"sense": "min", "layers": rows, "limits": {"bitops": 40 * 1000 * 12, "bytes": 40 * 350 + seed}}
        core = reduce(parse(table))
        dual = solve_dual(core)
        there = np.isfinite(core.score)
        owner = np.repeat(np.arange(len(core.rows)), there.sum(1))
        result = linprog(
            core.score[there],
            A_ub=core.cost[:, there],
            b_ub=core.caps,
            A_eq=np.eye(len(core.rows))[:, owner],
            b_eq=np.ones(len(core.rows)),
        )
        assert dual.bound <= result.fun + 1e-9
        assert dual.bound == pytest.approx(result.fun, rel=1e-5)


def test_listing_holds_every_part_policy_within_the_window():
    for _, core in cores(20, layers=(4, 5), choices=(3, 5)):
        dual = solve_dual(core)
        window = float(np.median(dual.reduced[np.isfinite(dual.reduced)])) * 2
        left, right = list_halves(core, dual, window, Work(math.inf))
        for half in (left, right):
            rows = [step.row for step in half.trail]
            near = [np.flatnonzero(dual.reduced[row] <= window) for row in rows]
            sums = [
                sum(dual.reduced[r, c] for r, c in zip(rows, pick, strict=True)) for pick in itertools.product(*near)
            ]
            assert half.state.shape[1] == sum(s <= window for s in sums)


@pytest.mark.parametrize("merge_at", [1, 512])
def test_recall_gives_back_the_part_policy(merge_at):
    for _, core in cores(20, layers=(4, 5), choices=(3, 5)):
        dual = solve_dual(core)
        half = Half.empty(len(core.caps))
        half.merge_at = merge_at
        for row in range(len(core.rows)):
            choices = np.setdiff1d(np.flatnonzero(np.isfinite(core.score[row])), [dual.base[row]])
            costs = core.cost[:, row, choices] - core.cost[:, row, dual.base[row], None]
            half.add(row, choices, np.vstack([dual.reduced[row, choices], costs]), math.inf, Work(math.inf))
        rows = np.arange(len(core.rows))
        base = core.cost[:, rows, dual.base].sum(1)
        for column in range(half.state.shape[1]):
            choice = dual.base.copy()
            half.recall(column, choice)
            assert dual.reduced[rows, choice].sum() == pytest.approx(half.state[0, column])
            assert (core.cost[:, rows, choice].sum(1) - base == half.state[1:, column]).all()


@pytest.mark.parametrize("m", [1, 2, 3])
@pytest.mark.parametrize("free", [False, True])
def test_pairs_miss_none_that_fits(m, free):
    rng = np.random.default_rng(m)
    for _ in range(30):
        a, b = (np.vstack([rng.random(n), rng.integers(-50, 50, (m, n))]) for n in (30, 40))
        prices = rng.random(m) * 0.05
        if free:
            prices[0] = 0.0
        spare, limit = rng.integers(-20, 40, m).astype(float), rng.choice([0.5, 1.5, 4.0, math.inf])
        slack = spare[:, None, None] - a[1:, :, None] - b[1:, None, :]
        total = a[0][:, None] + b[0] + np.tensordot(prices, slack, 1)
        fits = set(zip(*np.nonzero((slack >= 0).all(0) & (total <= limit)), strict=True))
        pairs = Pairs(a, b, spare, prices, limit)
        found = [(i, j) for ia, ib in pairs.chunks() for i, j in zip(ia, ib, strict=True)]
        assert fits <= set(found)
        assert len(found) == len(set(found)) == pairs.count


@pytest.mark.parametrize("seed", range(20))
def test_join_finds_the_best_pair(seed):
    """Against all pairs: two halves long enough to be halved several times."""
    rng = np.random.default_rng(seed)
    left, right = (Half(np.vstack([rng.random(n), rng.integers(-99, 99, (2, n))])) for n in (150, 700))
    prices, spare = rng.uniform(0.05, 0.3, 2), rng.integers(-99, 99, 2).astype(float)
    none = np.zeros(1, dtype=np.intp)
    core = Core(np.zeros((1, 1)), np.zeros((2, 1, 1)), spare, none, none[None], none, 0.0, exact=True)
    dual = Dual(prices, 0.0, none, np.zeros((1, 1)), 0.0)
    slack = spare[:, None, None] - left.state[1:, :, None] - right.state[1:, None, :]
    total = left.state[0][:, None] + right.state[0] + np.tensordot(prices, slack, 1)
    best = total[(slack >= 0).all(0)].min()
    for reach in (math.inf, best * (1 + 1e-9)):
        out = Progress()
        _join(core, dual, left, right, lambda choice: True, Work(math.inf), out, reach)
        assert out.above == pytest.approx(best, rel=1e-12)


def test_repair_meets_the_limits():
    met = 0
    for _, core in cores(60, layers=(4, 8), choices=(3, 5)):
        choice = repair(core, solve_dual(core))
        if choice is not None:
            met += 1
            assert (core.cost[:, np.arange(len(choice)), choice].sum(1) <= core.caps).all()
    assert met > 20
