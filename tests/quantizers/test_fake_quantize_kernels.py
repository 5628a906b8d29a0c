"""The quantizer in pieces of cached memory, as a whole and compiled, against the plain formula."""

import os
import subprocess
import sys

import pytest
import torch
from test_fake_quantize import case, plain
from torch import nn

from hub_mpq.quantizers import LSQ, compile_quantizers, compiled, fake_quantize, fake_quantize_kernels
from hub_mpq.quantizers.fake_quantize_kernels import Grid, on_grid, pull_back

SCALES = {"tensor": (1,), "rows": (6, 1, 1, 1), "columns": (1, 1, 1, 7)}
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "a view": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    "every second": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
}


@pytest.fixture(params=["pieces", "whole"])
def size(request, monkeypatch):
    """Pieces of a few elements, or all at once."""
    monkeypatch.setattr(fake_quantize_kernels, "_PIECE", 50 if request.param == "pieces" else 1 << 16)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("low", "high"), [(-2, 1), (0, 15), (-5, 10)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_layout_and_scale_equals_the_plain_formula(size, layout, scale, low, high, dtype):
    x, g = (LAYOUTS[layout](case((6, 4, 5, 7), seed, dtype)) for seed in (0, 1))
    s = (case(SCALES[scale], 2).abs() * 0.1 + 0.1).to(dtype)
    a, sa = x.double().clone().requires_grad_(), s.double().clone().requires_grad_()
    b, sb = x.clone().requires_grad_(), s.clone().requires_grad_()
    want, got = plain(a, sa, low, high, 0.25), fake_quantize(b, sb, low, high, grad_factor=0.25)
    assert got.dtype == dtype
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(got.double(), want, **tolerance)
    want.backward(g.double())
    got.backward(g)
    torch.testing.assert_close(b.grad.double(), a.grad, **tolerance)
    # terms of either sign cancel in the sum, what is left of their rounding does not: |g|·|v|·6e-8 each
    tolerance["atol"] *= 0.1 * g.abs().sum().item()
    torch.testing.assert_close(sb.grad.double(), sa.grad, **tolerance)


@pytest.mark.parametrize("scale", SCALES)
def test_slopes_are_the_finite_differences_while_the_rounding_error_is_fixed(size, scale):
    """Straight-through: with round(v) − v held inside the range and the end of the range outside, q is smooth."""
    x, g, s = case((6, 4, 5, 7)), case((6, 4, 5, 7), 1), case(SCALES[scale], 2).abs() * 0.1 + 0.1
    v = x / s
    inside, error = (v > -5) & (v < 10), v.round() - v

    def value(x, s):
        return (torch.where(inside, x + error * s, v.clamp(-5, 10) * s) * g).sum().item()

    dx, ds = pull_back(g, x, s, Grid(-5, 10), of_x=True, of_scale=True)
    e = 1e-5
    for index in ((0, 0, 0, 0), (3, 2, 1, 4), (5, 3, 4, 6)):
        step = torch.zeros_like(x)
        step[index] = e
        assert dx[index].item() == pytest.approx((value(x + step, s) - value(x - step, s)) / (2 * e), abs=1e-8)
    for i in range(s.numel()):
        step = torch.zeros_like(s).flatten()
        step[i] = e
        step = step.view_as(s)
        assert ds.flatten()[i].item() == pytest.approx((value(x, s + step) - value(x, s - step)) / (2 * e), abs=1e-7)


def test_binary_in_pieces(size):
    x, g, s = case((6, 40), dtype=torch.float32), case((6, 40), 1, torch.float32), torch.tensor([0.4])
    grid = Grid(-1, 1, binary=True)
    assert torch.equal(on_grid(x, s, grid), torch.where(x < 0, -s, s))
    dx, ds = pull_back(g, x, s, grid, of_x=True, of_scale=True)
    inside = x.abs() < s
    assert torch.equal(dx, g * inside)
    want = (g.double() * (torch.where(x < 0, -1, 1) - torch.where(inside, x / s, 0))).sum()
    assert ds.item() == pytest.approx(want.item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(size, dtype):
    x, g, s = case((6, 40)).to(dtype), case((6, 40), 1).to(dtype), torch.tensor([0.1])
    grid = Grid(-8, 7)
    q = on_grid(x, s, grid)
    assert q.dtype == dtype
    assert torch.equal(q, on_grid(x.float(), s, grid).to(dtype))
    half = pull_back(g, x, s, grid, of_x=True, of_scale=True)
    full = pull_back(g.float(), x.float(), s, grid, of_x=True, of_scale=True)
    assert half[0].dtype == dtype
    assert half[1].dtype == torch.float32
    assert torch.equal(half[0], full[0].to(dtype))
    torch.testing.assert_close(half[1], full[1], rtol=1e-6, atol=1e-6)


def test_only_what_is_asked_for_and_only_a_spare_gradient_is_overwritten(size):
    x, g, s = case((6, 40), dtype=torch.float32), case((6, 40), 1, torch.float32), torch.tensor([0.1])
    kept = g.clone()
    both = pull_back(g, x, s, Grid(-8, 7), of_x=True, of_scale=True)
    assert torch.equal(g, kept)
    assert pull_back(g, x, s, Grid(-8, 7), of_x=True, of_scale=False)[1] is None
    none, alone = pull_back(g, x, s, Grid(-8, 7), of_x=False, of_scale=True)
    assert none is None
    assert torch.equal(alone, both[1])
    assert torch.equal(g, kept)
    assert torch.equal(pull_back(g, x, s, Grid(-8, 7), of_x=True, of_scale=True, spare=True)[0], both[0])


def test_nothing_is_kept_but_x_and_the_scale(size):
    kept = []
    x, q = torch.randn(6, 40).requires_grad_(), LSQ((4,), signed=False)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        q(x)
    large = [t for t in kept if t.numel() > 1]
    assert [t.data_ptr() for t in large] == [x.data_ptr()]


def test_one_quantizer_used_twice_adds_its_gradients():
    q = LSQ((4,), signed=False)
    q.init(4, torch.tensor([0.05]))
    a, b = torch.rand(2, 30), torch.rand(2, 30)
    (q(a).sum() + q(b).sum()).backward()
    both, q.shift.grad = q.shift.grad, None
    parts = []
    for x in (a, b):
        q(x).sum().backward()
        parts.append(q.shift.grad)
        q.shift.grad = None
    torch.testing.assert_close(both, parts[0] + parts[1])


def test_input_that_changed_after_the_forward_is_noticed():
    q, x = LSQ((4,), signed=False), torch.rand(2, 30)
    out = q(x)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="inplace"):
        out.sum().backward()


def test_no_second_derivative_is_made_up():
    x = torch.rand(3, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(LSQ((4,), signed=False)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate"):
        grad.sum().backward()


def test_without_a_compiler_nothing_changes(monkeypatch):
    def broken(*_):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(compiled, "forward", broken)
    compiled.compiler_works.cache_clear()
    q = nn.Sequential(LSQ((4,), signed=False))
    assert compile_quantizers(q) is False
    assert q[0].compiled is False
    compiled.compiler_works.cache_clear()


_PROGRAM = """
import torch
from hub_mpq.quantizers import LSQ, compile_quantizers
q = LSQ((4,), signed=False)
q.init(4, torch.tensor([0.05]))
print("works", compile_quantizers(q))
x = torch.rand(2, 70000).requires_grad_()
q(x).sum().backward()
print(int(x.grad.sum()) > 0, float(q.shift.grad) != 0)
"""


@pytest.mark.slow
def test_a_machine_without_a_compiler(tmp_path):
    """In a fresh process: what a user without g++ sees."""
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "CXX": "/nonexistent/c++", "PATH": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", _PROGRAM], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["works", "False", "True", "True"]


@pytest.mark.slow
@pytest.mark.parametrize("scale", [(1,), (300, 1)])
def test_compiled_equals_the_pieces(scale):
    if not compiled.compiler_works():
        pytest.skip("no C++ compiler on this machine")
    x, g = case((300, 400), dtype=torch.float32), case((300, 400), 1, torch.float32)
    s = case(scale, 2, torch.float32).abs() * 0.1 + 0.05
    for low, high in ((0, 15), (-5, 10), (-8, 7), (-2, 1)):
        ours, theirs = Grid(low, high, factor=0.5), Grid(low, high, factor=0.5, compiled=True)
        assert torch.equal(on_grid(x, s, theirs), on_grid(x, s, ours))
        a = pull_back(g, x, s, ours, of_x=True, of_scale=True)
        b = pull_back(g, x, s, theirs, of_x=True, of_scale=True)
        assert torch.equal(a[0], b[0])
        # 120,000 terms of either sign add up in another order
        torch.testing.assert_close(a[1], b[1], rtol=1e-5, atol=1e-4)
