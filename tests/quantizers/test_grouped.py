"""Scales of groups and zero points in the learnable quantizer."""

import pytest
import torch

from hub_mpq.quantizers import LSQ, GroupedLSQ
from hub_mpq.quantizers.grouped import group_dtype
from hub_mpq.quantizers.weight_grid import WeightGrid, weight_grid

FORMS = [(None, False), (16, True), (16, False), (24, True), (24, False), (64, False)]


def made(bits, size, symmetric, *, rows=6, columns=40, transposed=False, dtype=torch.float32):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    q = GroupedLSQ((bits,), (rows, columns), group_size=size, symmetric=symmetric, transposed=transposed)
    scale, zero = weight_grid(weight, bits, group_size=size, symmetric=symmetric)
    q.init(bits, scale, zero)
    return q, weight, WeightGrid(bits, scale, zero, size)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize(("size", "symmetric"), FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_gives_the_nearest_points_of_the_grid(bits, size, symmetric, dtype):
    q, weight, grid = made(bits, size, symmetric, dtype=dtype)
    integers = grid.nearest(weight)
    assert torch.equal(q.stored(weight), integers.short())
    assert torch.equal(q(weight), grid.dequantize(integers).to(dtype))
    assert q(weight).dtype == dtype
    zero = q.group_zero_points()
    assert (zero is None) == (symmetric or bits == 1)
    # what is on the grid stays there: a packed weight that is loaded is the weight that was packed
    assert torch.equal(q.stored(q(weight)), integers.short())


@pytest.mark.parametrize(("size", "symmetric"), FORMS)
def test_the_rows_of_a_transposed_weight_are_its_columns(size, symmetric):
    q, weight, _ = made(3, size, symmetric)
    other = made(3, size, symmetric, transposed=True)[0]
    assert torch.equal(other(weight.t()), q(weight).t())
    assert torch.equal(other.stored(weight.t()), q.stored(weight).t())


def test_its_gradients_are_lsqs_of_each_group():
    """Two groups of 16 are two weights with a scale per row; the scales are ones that float16 has."""
    q, weight, _ = made(4, 16, True, columns=32)
    q.init(4, torch.full((6, 2), 0.25))
    weight.requires_grad_()
    g = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    (q(weight) * g).sum().backward()
    for i in range(2):
        part = slice(16 * i, 16 * (i + 1))
        lsq = LSQ((4,), signed=True, channels=6)
        lsq.init(4, torch.full((6,), 0.25))
        own = weight.detach()[:, part].clone().requires_grad_()
        (lsq(own) * g[:, part]).sum().backward()
        torch.testing.assert_close(weight.grad[:, part], own.grad)
        torch.testing.assert_close(q.shift.grad.view(6, 2)[:, i], lsq.shift.grad[0])


def test_zero_points_stay_where_they_are_while_scales_learn():
    q, weight, _ = made(4, 16, False)
    before = q.group_zero_points().clone()
    optimizer = torch.optim.SGD(q.parameters(), lr=0.1)
    first = q.group_scale().clone()
    for _ in range(3):
        optimizer.zero_grad()
        q(weight).square().sum().backward()
        optimizer.step()
    assert torch.equal(q.group_zero_points(), before)
    assert not torch.equal(q.group_scale(), first)
    assert q.group_scale().dtype == torch.float16
    assert torch.equal(q(weight), q.to_int(weight) * q.group_scale().float().repeat_interleave(16, 1)[:, :40])


def test_scales_that_float16_cannot_hold_are_bfloat16():
    assert group_dtype(torch.tensor([1e-3, 60000.0])) == torch.float16
    assert group_dtype(torch.tensor([1e-3, 70000.0])) == torch.bfloat16
    assert group_dtype(torch.tensor([1e-5, 1.0])) == torch.bfloat16
    q, _weight, _ = made(4, 16, True)
    q.init(4, torch.full((6, 3), 1e-6))
    assert q.group_scale().dtype == torch.bfloat16
    assert bool((q.group_scale() > 0).all())


def test_casts_leave_the_grid_where_it_is():
    q, weight, _ = made(4, 16, False)
    before = q(weight)
    assert torch.equal(q.to(torch.bfloat16)(weight), before)
    assert q.base.dtype == torch.float32


def test_it_can_be_narrowed_over_the_same_range():
    q, weight, _ = made(8, 16, False)
    full = q(weight)
    q.narrow(4)
    coarse = q(weight)
    q.narrow(None)
    assert torch.equal(q(weight), full)
    assert 4 * (full - weight).abs().mean() < (coarse - weight).abs().mean() < 0.5 * weight.abs().mean()


def test_a_compiler_can_trace_it():
    q, weight, _ = made(4, 24, False)
    program = torch.export.export(q, (weight,))
    assert torch.equal(program.module()(weight), q(weight))
