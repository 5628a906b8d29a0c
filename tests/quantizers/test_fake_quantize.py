"""The fused quantizer against the plain formula, differentiated by autograd."""

import copy
import math
import pickle

import pytest
import torch

from hub_mpq.errors import InvalidArgument
from hub_mpq.quantizers import LSQ, activation_scale, fake_quantize, weight_scale_mse, weight_scale_sigma
from hub_mpq.quantizers.base import LastRead


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


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("value", [1.0, -1.0, 3e-9, -3e-9, -1e-20])
def test_a_constant_input_of_either_sign_keeps_its_value(value, bits):
    q = LSQ((bits,), signed=False)
    q.init(bits, *activation_scale(torch.full((10,), value), bits, mse=True))
    assert q(torch.full((1,), value)).item() == pytest.approx(value, rel=1e-6)
    assert q(torch.zeros(1)).item() == 0


def test_an_input_of_zeros_alone_tells_neither_size_nor_sign():
    for x in (torch.zeros(10), torch.zeros(0), torch.tensor([math.nan])):
        scale, zero = activation_scale(x, 4, mse=True)
        assert scale.item() == pytest.approx(1 / 15)
        assert zero == 8
    assert activation_scale(torch.zeros(10), 1, mse=True)[1] == 0
    assert weight_scale_mse(torch.zeros(2, 3), 4).gt(0).all()


@pytest.mark.parametrize("unit", [2.0**-30, 2.0**-90, 2.0**60])
def test_scales_are_relative_to_their_tensor(unit):
    """A power of two rounds nothing, so that the scales are the same to the bit."""
    w = case((6, 40), dtype=torch.float32)
    w[3] = 0
    live = [0, 1, 2, 4, 5]
    for bits in (1, 2, 4, 8):
        for axis in (0, None):
            rows = live if axis == 0 else [0]
            got, want = weight_scale_mse(w * unit, bits, axis=axis), weight_scale_mse(w, bits, axis=axis)
            assert torch.equal(got[rows], want[rows] * unit)
        assert torch.equal(weight_scale_sigma(w * unit, bits), weight_scale_sigma(w, bits) * unit)
        for mse in (True, False):
            (got, zero), (want, same) = (activation_scale(x, bits, mse=mse) for x in (w * unit, w))
            assert torch.equal(got, want * unit)
            assert zero == same
    for log in (True, False):
        q = LSQ((4,), signed=True, channels=6, log=log)
        q.init(4, weight_scale_mse(w * unit, 4))
        got, want = (q(w * unit) / unit)[live], fake_quantize(w, weight_scale_mse(w, 4)[:, None], -8, 7)[live]
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_tiny_tensors_of_every_dtype_lose_no_more_than_others(dtype):
    def lost(unit):
        w = (case((6, 40)) * unit).to(dtype)
        q, x = LSQ((8,), signed=True, channels=6), LSQ((8,), signed=False)
        q.init(8, weight_scale_mse(w, 8))
        x.init(8, *activation_scale(w, 8, mse=True))
        return [((f(w) - w).double() / unit).norm().item() for f in (q, x)]

    assert lost(1e-9) == pytest.approx(lost(1.0), rel=0.05)


@pytest.mark.parametrize("unit", [1e-28, 1e-30, 1e-31, 2.0**-100])
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_a_tiny_weight_keeps_its_scale_and_is_the_same_reloaded(unit, bits):
    w = case((3, 7), dtype=torch.float32) * unit
    start = weight_scale_mse(w, bits)
    q = LSQ((bits,), signed=True, channels=3)
    q.init(bits, start)
    rounded = q(w).detach()
    assert torch.equal(q.scale, start)
    again = LSQ((bits,), signed=True, channels=3)
    again.init(bits, q.scale)
    assert torch.equal(again(rounded), rounded)


def test_a_linear_step_past_zero_stops_at_a_part_of_the_start():
    q = LSQ((4,), signed=True, log=False)
    q.init(4, torch.tensor([1e-9]))
    with torch.no_grad():
        q.shift.fill_(-1.0)
    assert 0 < q.scale.item() < 1e-14


@pytest.mark.parametrize("log", [True, False])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("step", [1e-6, 1e-2])
def test_weights_of_zeros_leave_zero_by_steps_of_any_size(step, bits, channels, log):
    q = LSQ((bits, 5), signed=True, channels=channels, log=log)
    q.set_width(bits)
    w, target = torch.zeros(3, 7, requires_grad=True), case((3, 7), dtype=torch.float32)
    q.init(bits, weight_scale_mse(w, bits, axis=0 if channels > 1 else None))
    assert q(w).abs().max() < 1e-25
    optimizer = torch.optim.Adam([w, q.shift], lr=step)
    for _ in range(20):
        optimizer.zero_grad()
        (q(w) - target).square().sum().backward()
        assert w.grad.ne(0).all(), "an element beyond the range would have no gradient"
        optimizer.step()
    assert q(w).abs().max().item() == pytest.approx(w.abs().max().item(), rel=0.5 if bits < 4 else 0.1)
    assert torch.equal(q(w), q.to_int(w) * (q.scale if channels == 1 else q.scale[:, None]))
    again = LSQ((bits,), signed=True, channels=channels)
    again.init(bits, q.scale)
    assert torch.equal(again(q(w)), q(w))


def test_a_dead_channel_leaves_zero_and_the_others_learn_their_scale():
    w = case((3, 7), dtype=torch.float32)
    w[1] = 0
    q = LSQ((4,), signed=True, channels=3)
    q.init(4, weight_scale_mse(w, 4))
    before = q.scale.detach().clone()
    w[1] = 1e-7
    assert torch.equal(q(w)[[0, 2]], fake_quantize(w, before[:, None], -8, 7)[[0, 2]])
    assert q(w)[1].tolist() == pytest.approx([1e-7] * 7, rel=0.1)
    assert torch.equal(q.scale[[0, 2]], before[[0, 2]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casts_leave_the_scales_float32(dtype):
    q = LSQ((4,), signed=True, channels=2)
    q.init(4, torch.tensor([0.1, 1e-9]))
    before = q.scale.detach().clone()
    q.shift.grad = torch.ones_like(q.shift)
    parent = torch.nn.Sequential(torch.nn.Sequential(q), torch.nn.Linear(2, 2))
    for cast in (lambda m: m.to(dtype), lambda m: m.to("cpu", dtype), lambda m: m.type(dtype)):
        assert cast(parent) is parent
        assert parent[1].weight.dtype == dtype
        assert {q.base.dtype, q.shift.dtype, q.shift.grad.dtype} == {torch.float32}
        assert torch.equal(q.scale, before)
    assert q.to("meta").base.is_meta
    assert q.base.dtype == torch.float32


def test_scales_are_float32_whatever_the_default_dtype(monkeypatch):
    torch.set_default_dtype(torch.float64)
    try:
        q = LSQ((4,), signed=False)
        q.init(4, *activation_scale(torch.rand(10), 4, mse=True))
    finally:
        torch.set_default_dtype(torch.float32)
    assert q.scale.dtype == torch.float32


def test_the_zero_point_is_that_of_the_state_in_use():
    q = LSQ((4,), signed=False)
    q.init(4, torch.tensor([0.1]), 3)
    other = LSQ((4,), signed=False)
    other.init(4, torch.tensor([0.1]), 5)
    state = other.state_dict()
    assert state["zero_points"]._version == q.zero_points._version, "what a memory could mistake for the same"
    x = torch.tensor([-1.0])
    assert q(x).item() == pytest.approx(-0.3)
    assert torch.func.functional_call(q, state, (x,)).item() == pytest.approx(-0.5)
    assert q(x).item() == pytest.approx(-0.3)
    q.load_state_dict(state, assign=True)
    assert q(x).item() == pytest.approx(-0.5)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(q)))  # noqa: S301
    twin.zero_points.data.fill_(7)
    assert (twin.zero_point, q.zero_point) == (7, 5)


def test_off_the_cpu_a_tensor_is_read_again_once_it_is_another_or_was_written():
    class Stub:
        """What is asked of a tensor on a GPU."""

        is_cpu, inference, _version = False, False, 0

        def is_inference(self):
            return self.inference

    reads = []
    read = LastRead(lambda tensor: reads.append(tensor) or len(reads))
    a, b = Stub(), Stub()
    assert [read(a), read(a), read(b), read(b), read(a)] == [1, 1, 2, 2, 3]
    a._version = 1
    assert [read(a), read(a)] == [4, 4]
    assert copy.deepcopy(LastRead(len)).read is len
    twin = copy.copy(read)
    assert twin(a) == 5, "a copy remembers nothing"
    b.inference = True  # without a version
    assert [read(b), read(b)] == [6, 7]
