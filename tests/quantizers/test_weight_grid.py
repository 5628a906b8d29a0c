"""Scales and zero points of weights, per channel and in groups."""

from __future__ import annotations

import pytest
import torch

from hub_mpq.errors import InvalidArgument
from hub_mpq.quantizers.lsq import NO_START
from hub_mpq.quantizers.weight_grid import CLIP_RATIOS, WeightGrid, weight_grid


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def grid_of(weight, bits, group_size=None, **options):
    return WeightGrid(bits, *weight_grid(weight, bits, group_size=group_size, **options), group_size)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group_size", [None, 8, 16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_shapes_and_ranges(bits, group_size, symmetric):
    weight = draw(6, 37) + 0.3
    grid = grid_of(weight, bits, group_size, symmetric=symmetric)
    groups = 1 if group_size is None else -(-37 // group_size)
    assert grid.scale.shape == (6, groups)
    assert grid.scale.dtype == (torch.float32 if group_size is None else torch.float16)
    values = grid.nearest(weight)
    assert values.dtype == torch.int8
    assert -(2 ** (bits - 1)) <= int(values.min()) <= int(values.max()) < 2 ** (bits - 1)
    if symmetric:
        assert grid.zero_point is None
    else:
        assert grid.zero_point.dtype == torch.int32
        assert grid.zero_point.shape == grid.scale.shape
        assert -(2 ** (bits - 1)) <= int(grid.zero_point.min()) <= int(grid.zero_point.max()) < 2 ** (bits - 1)
        assert grid_error(grid, weight) < grid_error(grid_of(weight, bits, group_size), weight)


def grid_error(grid, weight):
    return float((grid.dequantize(grid.nearest(weight)) - weight).double().square().sum())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("seen", [True, False])
def test_the_scale_is_the_clip_value_of_least_error(seen, symmetric, group_size, monkeypatch):
    """Squares weighted by importance; fourth powers without."""
    weight, h = draw(4, 40), draw(40, seed=1).exp()
    found = grid_of(weight, 3, group_size, symmetric=symmetric, importance=h if seen else None)
    monkeypatch.setattr("hub_mpq.quantizers.weight_grid.CLIP_RATIOS", (1.0,))
    whole = grid_of(weight, 3, group_size, symmetric=symmetric)
    for row in range(4):
        for group in range(whole.scale.shape[1]):
            columns = slice(None) if group_size is None else slice(group * group_size, (group + 1) * group_size)
            part, zero = weight[row : row + 1, columns], whole.zero_point
            zero = None if zero is None else zero[row, group].view(1, 1)

            def error(scale, part=part, zero=zero, columns=columns):
                grid = WeightGrid(3, scale.view(1, 1), zero)
                moved = (grid.dequantize(grid.nearest(part)) - part).double()
                return float((moved.square() * h[columns]).sum() if seen else moved.pow(4).sum())

            best = min(error(whole.scale[row, group].float() * ratio) for ratio in CLIP_RATIOS)
            assert error(found.scale[row, group].float()) == pytest.approx(best, rel=1e-2)
    assert not torch.equal(found.scale, whole.scale)


def test_importance_has_any_unit_and_may_differ_between_parts_of_the_rows():
    weight, h = draw(6, 12), draw(2, 12, seed=1).exp()
    scale, _ = weight_grid(weight, 3, importance=h)
    assert torch.equal(scale, weight_grid(weight, 3, importance=h * 1e30)[0])
    assert torch.equal(scale[:3], weight_grid(weight[:3], 3, importance=h[0])[0])
    assert torch.equal(scale[3:], weight_grid(weight[3:], 3, importance=h[1])[0])


def test_inputs_that_were_never_seen_count_alike():
    weight, h = draw(3, 16), torch.ones(16)
    h[8:] = 0
    scale, _ = weight_grid(weight, 3, group_size=8, importance=h)
    assert torch.equal(scale, weight_grid(weight, 3, group_size=8, importance=torch.ones(16))[0])
    assert bool((weight_grid(weight, 3, importance=torch.zeros(16))[0] > 0).all())


def test_rows_are_worked_on_in_pieces(monkeypatch):
    weight, h = draw(10, 24), draw(2, 24, seed=1).exp()
    whole = weight_grid(weight, 3, group_size=8, symmetric=False, importance=h)
    monkeypatch.setattr("hub_mpq.quantizers.weight_grid._PIECE", 50)
    pieces = weight_grid(weight, 3, group_size=8, symmetric=False, importance=h)
    assert all(map(torch.equal, whole, pieces))


@pytest.mark.parametrize("group_size", [None, 8])
def test_one_bit_is_the_weighted_mean_magnitude(group_size):
    weight, h = draw(3, 20), draw(20, seed=1).exp()
    grid = grid_of(weight, 1, group_size, symmetric=False, importance=h)
    assert grid.zero_point is None
    columns = slice(16, 20) if group_size else slice(None)  # the last group is not full
    wanted = (weight[:, columns].abs() * h[columns]).sum(1) / h[columns].sum()
    torch.testing.assert_close(grid.scale[:, -1].float(), wanted, rtol=1e-3, atol=0)
    values = grid.nearest(weight)
    assert torch.equal(values, torch.where(weight > 0, 1, -1).to(torch.int8))
    assert torch.equal(grid.dequantize(values).abs(), grid.of_columns(grid.scale.float(), 20).expand(3, 20))


@pytest.mark.parametrize("bits", [1, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_have_a_scale_that_can_be_stored(bits, symmetric):
    weight = draw(3, 16)
    weight[1] = 0
    weight[2, 8:] = 0
    channel = grid_of(weight, bits, symmetric=symmetric)
    assert float(channel.scale[1]) == NO_START
    for grid in (channel, grid_of(weight, bits, 8, symmetric=symmetric, importance=torch.ones(16))):
        assert bool((grid.scale > 0).all())
        assert float(grid.dequantize(grid.nearest(weight))[1].abs().max()) <= 2.0**-14


@pytest.mark.parametrize("factor", [1e-30, 1e-8, 1e7, 1e30])
def test_scales_outside_the_range_of_float16_are_bfloat16(factor):
    weight, h = draw(4, 32), draw(32, seed=1).exp()
    grid = grid_of(weight * factor, 4, 8, importance=h)
    assert grid.scale.dtype == torch.bfloat16
    wanted = grid_of(weight, 4, 8, importance=h).scale.float() * factor
    torch.testing.assert_close(grid.scale.float(), wanted, rtol=2**-7, atol=0)


def test_bfloat16_weights():
    weight = draw(4, 32).bfloat16()
    scale, zero = weight_grid(weight, 4, group_size=16, symmetric=False)
    wanted = weight_grid(weight.float(), 4, group_size=16, symmetric=False)
    assert torch.equal(scale, wanted[0])
    assert torch.equal(zero, wanted[1])


def test_codes_as_a_reader_of_the_packed_form_computes_them():
    """weight = (c − z)·s with codes c and z from 0 to 2^b−1."""
    weight = draw(3, 20)
    grid = grid_of(weight, 3, 8, symmetric=False)
    codes, zero = grid.nearest(weight).int() + 4, grid.zero_point + 4
    index = torch.arange(20) // 8
    wanted = (codes - zero[:, index]) * grid.scale.float()[:, index]
    assert torch.equal(grid.dequantize(grid.nearest(weight)), wanted)


def test_shapes_that_mean_nothing():
    with pytest.raises(InvalidArgument, match="rows, columns"):
        weight_grid(draw(2, 3, 4), 4)
    for importance in (draw(5), draw(4, 6), draw(1, 1, 6)):
        with pytest.raises(InvalidArgument, match="importance"):
            weight_grid(draw(6, 6), 4, importance=importance)
    with pytest.raises(InvalidArgument):
        weight_grid(draw(2, 3), 9)
