"""DQ: widths at known (d, qmax), and gradients against autograd of the plain formula."""

import pytest
import torch

from hub_mpq.errors import InvalidArgument
from hub_mpq.quantizers.dq import DQ, PARAMETRIZATIONS


def ste(x, y):
    return x + (y - x).detach()


def plain_uniform(x, d, qmax, signed):
    """The paper's sum, each round() with gradient 1, the clipping written out."""
    size = x.abs()
    inside = d * ste(size / d, (size / d + 0.5).floor())
    value = torch.where(size <= qmax, inside, qmax.expand_as(x)) * x.sign()
    return value if signed else value * (x > 0)


def plain_power(x, qmin, qmax, signed):
    size = x.abs()
    inside = ste(size, torch.exp2(torch.log2(size).round()))
    value = torch.where(size <= qmin, qmin.expand_as(x), torch.where(size > qmax, qmax.expand_as(x), inside)) * x.sign()
    return value if signed else value * (x > 0)


def data(seed=0, n=4000):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=generator), torch.randn(n, generator=generator)


@pytest.mark.parametrize(
    ("d", "qmax", "signed", "width"),
    [
        (1.0, 1.0, True, 2),
        (1.0, 3.0, True, 3),
        (1.0, 3.5, True, 4),
        (0.25, 1.75, True, 4),
        (0.1, 12.7, True, 8),
        (1.0, 1.0, False, 1),
        (1.0, 15.0, False, 4),
        (1.0, 15.5, False, 5),
    ],
)
def test_the_width_follows_from_step_and_range(d, qmax, signed, width):
    q = DQ(signed=signed, bounds=(1, 8))
    with torch.no_grad():
        q.step.fill_(d)
        q.range.fill_(qmax)
    assert float(q.width().detach()) == width
    codes = q(torch.linspace(-2 * qmax, 2 * qmax, 10001)).unique()
    assert len(codes) <= 2**width


@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
@pytest.mark.parametrize("bits", [2, 3, 5, 8])
@pytest.mark.parametrize("signed", [True, False])
def test_every_parametrization_starts_at_the_same_grid(parametrization, bits, signed):
    x, _ = data()
    q = DQ(signed=signed, bounds=(1, 8), parametrization=parametrization)
    q.init(bits, 1.5)
    assert float(q.width().detach()) == bits
    step = 1.5 / (2 ** (bits - 1) - 1 if signed else 2**bits - 1)
    torch.testing.assert_close(q(x), plain_uniform(x, torch.tensor(step), torch.tensor(1.5), signed))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
def test_the_power_of_two_grid_has_as_many_codes_as_its_width(parametrization, bits, signed):
    """±2^k, 2^(b−1) of each sign; unsigned: zero and 2^b − 1 powers."""
    if signed and bits == 1:
        return
    q = DQ(signed=signed, bounds=(1, 8), parametrization=parametrization, grid="power-of-two")
    q.init(bits, 4.0)
    q.project()
    assert float(q.width().detach()) == bits
    x = 4.0 * torch.exp2(-torch.arange(0, 40.0))
    codes = q(torch.cat([x, -x, *([] if signed else [torch.zeros(1)])])).detach().unique()
    assert len(codes) == 2**bits
    assert float(codes.max()) == 4.0
    assert bool((codes == 0).any()) is not signed
    if parametrization == "step-range":  # one octave more is one code more, and that needs one bit more
        with torch.no_grad():
            q.range.mul_(2)
        assert float(q.width().detach()) == bits + 1


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
def test_wide_power_of_two_grids_stay_within_float32(parametrization, signed):
    for bits in (7, 8):
        for top in (1e-6, 1.0, 1e4):
            q = DQ(signed=signed, bounds=(bits, 8), parametrization=parametrization, grid="power-of-two")
            q.init(bits, top)
            q.project()
            x = data()[0] * top
            out = q(x)
            (out.sum() + q.width() * 0.0).backward()  # a penalty that is met: its zero gradient must stay one
            assert torch.isfinite(out).all()
            assert float(out.detach().max()) == pytest.approx(top, rel=0.42)  # 2^½: the range is rounded to a power
            assert all(torch.isfinite(p.grad) for p in q.parameters())
            assert float(q.width().detach()) >= bits


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("grid", ["uniform", "power-of-two"])
def test_gradients_are_those_of_the_plain_formula(grid, signed):
    x, g = data()
    q = DQ(signed=signed, bounds=(1, 8), grid=grid)
    start = (0.3, 1.1) if grid == "uniform" else (0.25, 1.0)
    with torch.no_grad():
        q.step.fill_(start[0])
        q.range.fill_(start[1])
    a = x.clone().requires_grad_(True)
    (q(a) * g).sum().backward()
    b, d, qmax = x.clone().requires_grad_(True), *(torch.tensor(v, requires_grad=True) for v in start)
    plain = plain_uniform if grid == "uniform" else plain_power
    (plain(b, d, qmax, signed) * g).sum().backward()
    torch.testing.assert_close(q.step.grad, d.grad, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(q.range.grad, qmax.grad, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("parametrization", ["bits-step", "bits-range"])
def test_gradient_of_the_width_is_the_chain_rule(parametrization):
    """∂Q/∂b by finite differences of the plain formula in a real b, where no element changes sides or rounds."""
    x = torch.tensor([5.0, 7.0, -9.0])  # all outside the range: Q = ±qmax(b)
    q = DQ(signed=True, bounds=(2, 8), parametrization=parametrization)
    q.init(3, 1.5)
    q(x).sum().backward()
    if parametrization == "bits-range":
        assert float(q.bits.grad) == 0  # qmax is a number of its own
        return
    eps, step = 1e-4, 0.5
    want = (step * (2 ** (2 + eps) - 1) - step * (2 ** (2 - eps) - 1)) / (2 * eps)
    assert float(q.bits.grad) == pytest.approx(want, rel=1e-4)


def test_step_and_range_never_act_on_one_element():
    for value in (-3.0, -0.5, 0.3, 0.9, 2.0):
        q = DQ(signed=True, bounds=(2, 8))
        q.init(3, 1.2)
        q(torch.tensor([value])).sum().backward()
        assert (q.step.grad == 0) != (q.range.grad == 0)


def test_gradients_are_clipped_by_the_step_and_the_range_is_projected():
    q = DQ(signed=True, bounds=(2, 4))
    q.init(4, 0.7)
    q.step.grad, q.range.grad = torch.tensor(9.0), torch.tensor(-9.0)
    q.clip_gradients()
    assert float(q.step.grad) == pytest.approx(0.1)
    assert float(q.range.grad) == pytest.approx(-0.1)
    with torch.no_grad():
        q.range.fill_(100.0)
    q.project()
    assert float(q.width().detach()) == 4
    with torch.no_grad():
        q.range.fill_(0.0)
    q.project()
    assert float(q.range.detach()) == pytest.approx(float(q.step.detach()))  # qmax is at least d
    assert float(q.width().detach()) == 2


def test_power_of_two_steps_are_powers_of_two():
    q = DQ(signed=True, bounds=(2, 8), power_of_two_step=True)
    with torch.no_grad():
        q.step.fill_(0.3)
        q.range.fill_(2.0)
    x, _ = data()
    inside = q(x)[x.abs() <= 2.0]
    assert torch.equal(inside * 4, (inside * 4).round())
    assert q.step.grad is None
    q(x).sum().backward()
    assert q.step.grad is not None


def test_bad_words_are_refused():
    with pytest.raises(InvalidArgument, match="parametrization"):
        DQ(signed=True, bounds=(2, 8), parametrization="step")
    with pytest.raises(InvalidArgument, match="grid"):
        DQ(signed=True, bounds=(2, 8), grid="log")
