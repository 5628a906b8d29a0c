"""The fused quantizer against the plain formula, differentiated by autograd."""

import math

import pytest
import torch

from hub_mpq.errors import InvalidArgument
from hub_mpq.quantizers import LSQ, activation_scale, fake_quantize, weight_scale_mse, weight_scale_sigma


def plain(x, s, low, high, factor=1.0):
    """LSQ as its paper writes it: straight-through rounding, gradient of s scaled."""
    s = s * factor + (s * (1 - factor)).detach()
    v = x / s
    inside = (v > low) & (v < high)
    v = torch.where(inside, v, v.detach().clamp(low, high))
    return (v + (v.round() - v).detach()) * s


def case(shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(("low", "high"), [(-2, 1), (-8, 7), (0, 15), (-5, 10), (-128, 127), (0, 1)])
@pytest.mark.parametrize("shape", [(7,), (2, 3, 5, 5), (4, 9)])
def test_value_and_gradients_equal_the_plain_formula(shape, low, high):
    x, g = case(shape), case(shape, 1)
    s = torch.tensor([0.13], dtype=torch.float64)
    a, sa = x.clone().requires_grad_(), s.clone().requires_grad_()
    b, sb = x.float().requires_grad_(), s.float().requires_grad_()
    want, got = plain(a, sa, low, high, 0.25), fake_quantize(b, sb, low, high, grad_factor=0.25)
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)
    want.backward(g)
    got.backward(g.float())
    torch.testing.assert_close(b.grad.double(), a.grad, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sb.grad.double(), sa.grad, rtol=1e-5, atol=1e-6)


def test_per_channel_equals_each_channel_by_itself():
    x, g = case((3, 4, 2), dtype=torch.float32), case((3, 4, 2), 1, torch.float32)
    s = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1).requires_grad_()
    xs = x.clone().requires_grad_()
    fake_quantize(xs, s, -4, 3).backward(g)
    for i in range(3):
        xi, si = x[i].clone().requires_grad_(), s[i].detach().reshape(1).requires_grad_()
        fake_quantize(xi, si, -4, 3).backward(g[i])
        torch.testing.assert_close(xs.grad[i], xi.grad)
        torch.testing.assert_close(s.grad[i].reshape(1), si.grad)


def test_gradient_of_the_scale_is_the_slope_where_rounding_is_fixed():
    """Outside the range q = s·bound is smooth in s: a finite difference sees the same slope."""
    x = torch.tensor([10.0, -10.0, 12.0])
    s = torch.tensor([0.5], requires_grad=True)
    fake_quantize(x, s, -8, 7).sum().backward()
    e = 1e-3
    slope = (fake_quantize(x, s + e, -8, 7).sum() - fake_quantize(x, s - e, -8, 7).sum()) / (2 * e)
    assert s.grad.item() == pytest.approx(slope.item(), rel=1e-4)


def test_binary_has_no_zero():
    x = torch.tensor([-2.0, -0.0, 0.0, 0.1])
    out = fake_quantize(x, torch.tensor([0.5]), -1, 1, binary=True)
    assert out.tolist() == [-0.5, 0.5, 0.5, 0.5]


def test_half_precision_input_keeps_its_dtype():
    q = LSQ((4,), signed=True)
    assert q(torch.randn(3, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("signed", [True, False])
def test_forward_is_exactly_the_integers_times_the_scale(bits, signed):
    x = case((8, 6), dtype=torch.float32)
    q = LSQ((bits,), signed=signed, channels=8 if signed else 1)
    q.init(bits, torch.rand(8, generator=torch.Generator().manual_seed(3)) + 0.1 if signed else torch.tensor([0.2]))
    if not signed and bits > 1:
        q.zero_points.fill_(1)
    scale = q.scale.view(-1, 1) if signed else q.scale
    integers = q.to_int(x)
    assert torch.equal(q(x), integers.float() * scale)
    assert len(integers.unique()) <= 2**bits


def test_a_reloaded_weight_stays_on_its_grid_bit_for_bit():
    q = LSQ((5,), signed=True, channels=8)
    w = case((8, 50), dtype=torch.float32)
    q.init(5, weight_scale_mse(w, 5))
    with torch.no_grad():
        q.shift.add_(0.37)
    once = q(w)
    again = LSQ((5,), signed=True, channels=8)
    again.init(5, q.scale)
    assert torch.equal(again(once), once)


def test_one_vector_holds_every_width_and_only_the_chosen_one_learns():
    q = LSQ((2, 3, 4), signed=False)
    assert len(list(q.parameters())) == 1
    q.set_width(3)
    q(torch.rand(2, 5)).sum().backward()
    assert [bool(g) for g in q.shift.grad[:, 0]] == [False, True, False]
    with pytest.raises(InvalidArgument, match="5 bits"):
        q.set_width(5)


def test_gradient_factor_counts_features_per_sample_not_the_batch():
    x = torch.rand(1, 6)
    grads = []
    for batch in (x, x.repeat(4, 1)):
        q = LSQ((4,), signed=False)
        q.init(4, torch.tensor([0.05]))
        q(batch).sum().backward()
        grads.append(q.shift.grad.item() / len(batch))
    assert grads[0] == pytest.approx(grads[1], rel=1e-5)


def test_authors_initial_value():
    w = case((64, 32), dtype=torch.float32)
    want = max(abs(w.mean() - 3 * w.std(unbiased=False)), abs(w.mean() + 3 * w.std(unbiased=False))) / 8
    assert weight_scale_sigma(w, 4).item() == pytest.approx(want.item(), rel=1e-6)
    x = w.abs()
    assert activation_scale(x, 4, mse=False)[0].item() == pytest.approx(2 * x.mean().item() / math.sqrt(15), rel=1e-6)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_mse_scale_is_no_worse_than_any_scale_tried_by_hand(bits):
    w = case((3, 40), dtype=torch.float32)
    q = LSQ((bits,), signed=True, channels=3)
    q.init(bits, weight_scale_mse(w, bits))
    best = (q(w) - w).square().sum(1)
    top = w.abs().amax(1)
    for ratio in (0.3, 0.5, 0.8, 1.0):
        q.init(bits, top * ratio / max(2 ** (bits - 1) - 1, 1))
        # the grid of trials is 2 % wide, an error near its minimum changes by less than 2 %
        assert (best <= (q(w) - w).square().sum(1) * 1.02).all()


def test_signed_activations_get_a_zero_point_and_others_none():
    x = case((2000,), dtype=torch.float32)
    assert activation_scale(x.relu(), 4, mse=True)[1] == 0
    assert activation_scale(x, 4, mse=True)[1] in (7, 8)
    skewed = torch.nn.functional.gelu(x)
    scale, zero = activation_scale(skewed, 4, mse=True)
    assert 0 < zero < 4
    q = LSQ((4,), signed=False)
    q.init(4, scale, zero)
    assert q(torch.zeros(1)).item() == 0.0
    assert q(skewed).min() < 0


def test_constant_input_does_not_break_calibration():
    scale, zero = activation_scale(torch.zeros(10), 4, mse=True)
    assert scale.item() > 0
    assert zero == 0
    assert weight_scale_mse(torch.zeros(2, 3), 4).gt(0).all()
