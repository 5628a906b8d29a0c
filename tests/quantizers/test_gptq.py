"""GPTQ against a slow reference: column by column, with explicit inverses, in float64."""

from __future__ import annotations

import pytest
import torch

from hub_mpq.errors import InvalidArgument
from hub_mpq.quantizers.gptq import DAMPING, Factor
from hub_mpq.quantizers.weight_grid import WeightGrid, weight_grid


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moments(columns, rows=None, seed=0):
    """H of correlated inputs of very different energy."""
    x = draw(rows or 4 * columns, columns, seed=seed) @ draw(columns, columns, seed=seed + 1)
    x = x * draw(columns, seed=seed + 2).mul(1.5).exp()
    return x.t() @ x / len(x)


def grid_of(weight, bits, h, group_size=None, symmetric=True):
    made = weight_grid(weight, bits, group_size=group_size, symmetric=symmetric, importance=h.diagonal())
    return WeightGrid(bits, *made, group_size)


def reference(weight, h, grid, damping=DAMPING):
    """The authors' rule: fix one column, move all the others by the least-squares answer to its error."""
    w, h = weight.double().clone(), h.double().clone()
    h += torch.eye(len(h)) * damping * h.diagonal().mean()
    left = torch.argsort(h.diagonal(), stable=True).flip(0).tolist()
    out = torch.zeros(weight.shape, dtype=torch.int8)
    scale = grid.of_columns(grid.scale.double(), w.shape[1]).expand_as(w)
    zero = torch.zeros_like(scale)
    if grid.zero_point is not None:
        zero = grid.of_columns(grid.zero_point.double(), w.shape[1]).expand_as(w)
    low, high = -(2 ** (grid.bits - 1)), 2 ** (grid.bits - 1) - 1
    while left:
        j, others = left[0], left[1:]
        if grid.bits == 1:
            v = torch.where(w[:, j] > 0, 1.0, -1.0).double()
        else:
            v = (w[:, j] / scale[:, j] + zero[:, j]).round().clamp(low, high)
        out[:, j] = v.to(torch.int8)
        error = w[:, j] - (v - zero[:, j]) * scale[:, j]
        if others:
            # argmin over the others' change d of (e, d) H (e, d)ᵀ
            inverse = torch.linalg.inv(h[others][:, others])
            w[:, others] += error[:, None] * (h[j, others] @ inverse)[None]
        left = others
    return out


def error_of(values, weight, h, grid):
    moved = (grid.dequantize(values) - weight).double()
    return ((moved @ h.double()) * moved).sum(1)


@pytest.mark.parametrize(("group_size", "symmetric"), [(None, True), (None, False), (16, True), (24, False)])
def test_it_is_the_reference(group_size, symmetric):
    weight, h = draw(5, 70, seed=3), moments(70)  # more than one block, a last group that is not full
    grids = [grid_of(weight, b, h, group_size, symmetric) for b in (1, 2, 3, 4, 6, 8)]
    for grid, values in zip(grids, Factor(h).round(weight, grids), strict=True):
        assert values.dtype == torch.int8
        wanted = reference(weight, h, grid)
        # a value within float32's rounding of a tie may fall on its other side, and moves what follows
        assert float((values != wanted).float().mean()) < 0.02
        own, best = (error_of(v, weight, h, grid).sum() for v in (values, wanted))
        assert float(own) == pytest.approx(float(best), rel=1e-2)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("group_size", [None, 32])
def test_the_output_error_is_far_below_the_nearest_points(seed, group_size):
    weight, h = draw(24, 150, seed=seed), moments(150, seed=10 * seed)
    grids = [grid_of(weight, b, h, group_size) for b in (2, 3, 4, 8)]
    for grid, values in zip(grids, Factor(h).round(weight, grids), strict=True):
        own, nearest = (error_of(v, weight, h, grid).sum() for v in (values, grid.nearest(weight)))
        assert own < 0.7 * nearest


def ill_conditioned(columns):
    """Moments that are whole numbers, so that float32 holds them, and all of whose pivots are 1."""
    lower = torch.randint(-3, 4, (columns, columns), generator=torch.Generator().manual_seed(1)).double().tril(-1)
    lower += torch.eye(columns)
    return (lower @ lower.t()).float()


@pytest.mark.parametrize("columns", [6, 10, 18, 40])
def test_no_row_has_a_larger_error_than_its_nearest_points(columns):
    """Where columns leave their range to make up for others, they can't."""
    weight, h = draw(64, columns, seed=5), ill_conditioned(columns)
    damped = h + DAMPING * h.diagonal().mean() * torch.eye(columns)
    grids = [grid_of(weight, b, h, 8) for b in (1, 2, 4)]
    for grid, values in zip(grids, Factor(h).round(weight, grids), strict=True):
        nearest = error_of(grid.nearest(weight), weight, damped, grid)
        assert bool((error_of(values, weight, damped, grid) <= nearest * (1 + 1e-5)).all())
    assert any(bool((reference(weight, h, grid) != grid.nearest(weight)).any()) for grid in grids)


@pytest.mark.parametrize("h", [torch.eye(40), torch.diag(torch.arange(40.0)), torch.zeros(40, 40)])
def test_uncorrelated_inputs_are_rounded_to_nearest(h):
    weight = draw(6, 40)
    grids = [grid_of(weight, b, torch.eye(40), 16) for b in (1, 3, 4)]
    for grid, values in zip(grids, Factor(h).round(weight, grids), strict=True):
        assert torch.equal(values, grid.nearest(weight))


def test_all_grids_at_once_are_each_alone(monkeypatch):
    weight, h = draw(11, 30), moments(30)
    grids = [grid_of(weight, 3, h, 8), grid_of(weight, 1, h), grid_of(weight, 5, h, 16, symmetric=False)]
    factor = Factor(h)
    together = factor.round(weight, grids)
    assert all(torch.equal(x, factor.round(weight, [g])[0]) for x, g in zip(together, grids, strict=True))
    monkeypatch.setattr("hub_mpq.quantizers.gptq._ROWS", 12)  # four rows at a time
    monkeypatch.setattr("hub_mpq.quantizers.gptq._BLOCK", 7)
    for one, other, grid in zip(together, factor.round(weight, grids), grids, strict=True):
        own, pieces = (float(error_of(v, weight, h, grid).sum()) for v in (one, other))
        assert own == pytest.approx(pieces, rel=1e-3)


def test_columns_that_were_never_seen_are_rounded_to_nearest():
    weight, h = draw(6, 40), moments(40)
    dead = [0, 7, 39]
    h[dead] = 0
    h[:, dead] = 0
    grid = grid_of(weight, 3, h)
    values = Factor(h).round(weight, [grid])[0]
    assert torch.equal(values[:, dead], grid.nearest(weight)[:, dead])
    kept = [j for j in range(40) if j not in dead]
    assert float((values != reference(weight, h, grid)).float()[:, kept].mean()) < 0.02


def test_moments_of_fewer_inputs_than_columns():
    weight, h = draw(8, 64), moments(64, rows=5)
    factor = Factor(h)
    assert factor.damping == DAMPING
    grid = grid_of(weight, 4, h)
    values = factor.round(weight, [grid])[0]
    assert error_of(values, weight, h, grid).sum() < 0.5 * error_of(grid.nearest(weight), weight, h, grid).sum()


def test_more_damping_where_there_is_no_factor():
    h = torch.ones(20, 20) - 0.5 * torch.eye(20)  # a moment matrix can't have such eigenvalues, rounding can
    h[0, 1] = h[1, 0] = 1.2
    factor = Factor(h, damping=1e-6)
    assert factor.damping > 1e-6
    assert bool(torch.isfinite(factor.ratios).all())


def test_float64_where_float32_loses_the_small_pivots(monkeypatch):
    cholesky, seen = torch.linalg.cholesky_ex, []
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda h: (seen.append(h.dtype), cholesky(h))[1])
    assert Factor(ill_conditioned(8), damping=1e-9).damping == 1e-9
    assert seen == [torch.float32]
    factor = Factor(ill_conditioned(22), damping=1e-9)
    assert seen[1:] == [torch.float32, torch.float64]
    assert factor.damping == 1e-9
    h = ill_conditioned(22).double()[factor.order][:, factor.order]
    h.diagonal().add_(1e-9 * h.diagonal().mean())
    wanted = torch.linalg.cholesky(h).diagonal().square()
    torch.testing.assert_close(factor.pivots.double() * float(h.diagonal().mean()), wanted, rtol=1e-3, atol=0)


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_moments_have_any_unit(factor):
    weight, h = draw(6, 40), moments(40)
    grid = grid_of(weight, 3, h)
    assert torch.equal(Factor(h * factor).round(weight, [grid])[0], Factor(h).round(weight, [grid])[0])


def test_bfloat16_weights_and_moments_that_stay_as_they_are():
    weight, h = draw(6, 40).bfloat16(), moments(40)
    before, grid = h.clone(), grid_of(weight, 3, h, 16)
    values = Factor(h).round(weight, [grid])[0]
    assert torch.equal(values, Factor(h).round(weight.float(), [grid])[0])
    assert torch.equal(h, before)


def test_moments_that_are_none():
    for h in (draw(3, 4), torch.full((3, 3), torch.nan), torch.full((3, 3), torch.inf)):
        with pytest.raises(InvalidArgument):
            Factor(h)
