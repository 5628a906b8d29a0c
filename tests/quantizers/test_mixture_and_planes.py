"""EBS's mixtures and BSQ's bit planes: values, gradients, and dropping planes to the last bit."""

import pytest
import torch

from hub_mpq.quantizers.bit_planes import BitPlanes
from hub_mpq.quantizers.mixture import Mixture


def weight(seed=0, shape=(6, 5, 3, 3)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.1


def mixture():
    q = Mixture((2, 3, 5), signed=True)
    for bits, scale in ((2, 0.1), (3, 0.06), (5, 0.02)):
        q.lsq.init(bits, torch.tensor([scale]))
    return q


def test_a_mixture_is_the_sum_and_its_strengths_have_the_gradient_of_the_sum():
    q, x = mixture(), weight()
    g = weight(1)
    with torch.no_grad():
        q.strengths.copy_(torch.tensor([0.3, -0.2, 0.5]))
    parts = []
    for bits in q.widths:
        q.lsq.set_width(bits)
        parts.append(q.lsq(x).detach())
    r = torch.tensor([0.3, -0.2, 0.5], requires_grad=True)
    want = sum(p * part for p, part in zip(torch.softmax(r, 0), parts, strict=True))
    out = q(x)
    torch.testing.assert_close(out, want)
    (out * g).sum().backward()
    (want * g).sum().backward()
    torch.testing.assert_close(q.strengths.grad, r.grad)
    torch.testing.assert_close(q.prices.grad, r.grad)
    eps = 1e-2  # finite differences of the whole forward pass
    for i in range(3):
        both = []
        for sign in (1, -1):
            with torch.no_grad():
                q.strengths[i] += sign * eps
                both.append(float((q(x) * g).double().sum()))
                q.strengths[i] -= sign * eps
        assert float(q.strengths.grad[i]) == pytest.approx((both[0] - both[1]) / (2 * eps), rel=2e-2, abs=1e-4)


def test_one_hot_strengths_are_one_quantizer():
    q, x = mixture(), weight()
    with torch.no_grad():
        q.strengths[1] = 200.0
    mixed = q(x)
    q.lsq.set_width(3)
    assert torch.equal(mixed, q.lsq(x))
    assert float(q.expected_width().detach()) == 3.0


def test_gumbel_draws_come_from_the_generator_and_sharpen():
    q = mixture()
    q.draw(torch.Generator().manual_seed(3))
    first = q.weights()
    q.draw(torch.Generator().manual_seed(3))
    assert torch.equal(first, q.weights())
    q.temperature = 0.01
    assert float(q.weights().detach().max()) > 0.99
    with torch.no_grad():
        q.strengths.copy_(torch.tensor([0.0, 1.0, 2.0]))
    hits, generator = torch.zeros(3), torch.Generator().manual_seed(0)
    for _ in range(4000):
        q.draw(generator)
        hits[q.weights().argmax()] += 1
    # the standard error of a share of 4000 draws is below 0.008
    torch.testing.assert_close(hits / 4000, torch.softmax(q.strengths.detach(), 0), atol=0.03, rtol=0)


def test_planes_hold_the_weight_on_its_grid():
    w = weight()
    q = BitPlanes(w, 7)
    assert q.bits == 8
    step = w.abs().max() / 127
    torch.testing.assert_close(q(w), (w / step).round() * step)


def test_gradients_of_planes_are_the_formula():
    w, g = weight(), weight(1)
    q = BitPlanes(w, 4)
    (q(w) * g).sum().backward()
    for i in range(4):
        want = g * q.step * 2**i
        torch.testing.assert_close(q.planes.grad[0, i], want)
        torch.testing.assert_close(q.planes.grad[1, i], -want)
    assert not q.planes.grad[:, 4].any()  # the plane for carries is not alive


def disturbed(seed, count=5):
    """Planes as training leaves them: real numbers in [0, 2]."""
    q = BitPlanes(weight(seed), count)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        q.planes += 0.6 * torch.randn(q.planes.shape, generator=generator)
        q.planes[:, count] = 0
    q.clip()
    return q


@pytest.mark.parametrize("seed", range(8))
def test_requantizing_keeps_the_function_to_the_last_bit(seed):
    q = disturbed(seed)
    before = q(weight())
    q.requantize()
    assert set(q.planes.unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(q(weight()), before)
    q.requantize()
    assert torch.equal(q(weight()), before)


@pytest.mark.parametrize(("low", "high"), [(2, 5), (0, 3), (1, 4), (3, 4)])
def test_empty_planes_are_dropped_at_both_ends_and_nothing_changes(low, high):
    q = BitPlanes(weight(), 5)
    with torch.no_grad():
        q.planes[:, :low] = 0
        q.planes[:, high:] = 0
    before, step = q(weight()), float(q.step)
    assert q.requantize() is True
    assert q.span == (low, high)
    assert q.bits == high - low + 1
    after = q(weight())
    assert torch.equal(after, before)
    codes = q.codes().detach()
    assert float(codes.abs().max()) <= 2 ** (high - low) - 1  # it really is that narrow
    assert torch.equal(codes * (step * 2**low), after)
    (q(weight()) * weight(1)).sum().backward()
    assert not q.planes.grad[:, :low].any()


def test_carries_open_the_spare_plane():
    q = BitPlanes(torch.tensor([1.0, -1.0, 0.5]), 3)
    with torch.no_grad():
        q.planes[0, :3, 0] = 2.0
    before = q(torch.zeros(3))
    q.requantize()
    assert q.span == (0, 4)
    assert torch.equal(q(torch.zeros(3)), before)


def test_a_layer_of_zeros_has_no_planes_left():
    q = BitPlanes(weight(), 3)
    with torch.no_grad():
        q.planes.zero_()
    q.requantize()
    assert q.bits == 1
    assert not q(weight()).any()


def test_planes_lie_where_the_weight_does():
    assert {x.device.type for x in BitPlanes(torch.zeros(3, 4, device="meta"), 5).state_dict().values()} == {"meta"}
