"""Quantized gradients: unbiased, variances in the order of the theory, and training with them works."""

import copy

import pytest
import torch

from hub_mpq import HubMPQ
from hub_mpq.errors import InvalidArgument
from hub_mpq.train.gradient_quantizers import KINDS, GradientQuantization, quantize_gradient

DRAWS = 400


def gradients(outliers=3):
    """Like real ones: a few samples matter, the rest is near zero."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(24, 40, generator=generator) * 0.01
    rows[:outliers] *= torch.tensor([300.0, 100.0, 50.0])[:outliers, None]
    return rows


def moments(grad, bits, kind):
    generator = torch.Generator().manual_seed(1)
    draws = torch.stack([quantize_gradient(grad, bits, kind, generator) for _ in range(DRAWS)]).double()
    return draws.mean(0), draws.var(0)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_unbiased(kind, bits):
    grad = gradients()
    mean, var = moments(grad, bits, kind)
    # without bias the squared error of a mean is its variance over the number of draws. The large rows have 120
    # elements, so the ratio has a standard deviation of sqrt(2 / 120) = 0.13 around 1
    for rows in (slice(0, 3), slice(3, None)):
        error = (mean - grad.double())[rows].square().sum()
        assert float(error) < 1.6 * float(var[rows].sum()) / DRAWS


@pytest.mark.parametrize("bits", [3, 5])
def test_variance_falls_from_tensor_to_sample_to_householder(bits):
    total = {kind: float(moments(gradients(), bits, kind)[1].sum()) for kind in KINDS}
    assert total["householder"] < 0.7 * total["sample"] < 0.7 * total["tensor"]


def test_on_even_rows_householder_is_never_worse_than_per_sample():
    even = torch.randn(32, 20, generator=torch.Generator().manual_seed(2))
    total = {kind: float(moments(even, 4, kind)[1].sum()) for kind in KINDS}
    # equal bounds; 5 % is the noise of these 400 draws
    assert total["householder"] <= 1.05 * total["sample"] <= 1.05**2 * total["tensor"]


@pytest.mark.parametrize("kind", KINDS)
def test_values_lie_on_a_grid_of_that_width(kind):
    grad = gradients()
    out = quantize_gradient(grad, 3, kind, torch.Generator().manual_seed(0))
    if kind == "tensor":
        assert len(out.unique()) <= 8
    elif kind == "sample":
        assert all(len(row.unique()) <= 8 for row in out)
    again = quantize_gradient(grad, 3, kind, torch.Generator().manual_seed(0))
    assert torch.equal(out, again)


@pytest.mark.parametrize("kind", KINDS)
def test_zero_and_constant_rows_and_four_axes(kind):
    generator = torch.Generator().manual_seed(0)
    assert not quantize_gradient(torch.zeros(4, 6), 4, kind, generator).any()
    grad = gradients().view(24, 10, 2, 2)
    out = quantize_gradient(grad, 8, kind, generator)
    assert out.shape == grad.shape
    assert float((out - grad).norm() / grad.norm()) < 0.1
    one = torch.full((1, 5), 0.3)
    torch.testing.assert_close(quantize_gradient(one, 4, kind, generator), one)


def test_the_backward_pass_of_a_layer_sees_quantized_gradients(net, train):
    mpq = HubMPQ.from_module(net, torch.zeros(1, 1, 8, 8)).apply_policy("W6A6", train)
    x, labels = next(iter(train))

    def grads():
        mpq.model.zero_grad()
        torch.nn.functional.cross_entropy(mpq.model(x), labels).backward()
        return mpq.model[3].weight.grad.clone()

    plain = grads()
    schedule = GradientQuantization(mpq.model, 4, "sample", seed=1)
    schedule.set(0)
    first = grads()
    assert not torch.equal(first, plain)
    schedule.set(0)
    assert torch.equal(grads(), first)  # a resumed step draws the same
    schedule.release()
    assert torch.equal(grads(), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_fine_tuning_with_quantized_gradients_learns(kind, net, train, val):
    mpq = HubMPQ.from_module(copy.deepcopy(net), torch.zeros(1, 1, 8, 8)).apply_policy("W6A6", train)
    before = mpq.evaluate(val)["loss"]
    mpq.finetune(train, steps=20, lr=1e-2, gradient_bits=6, gradient_quantizer=kind)
    assert mpq.evaluate(val)["loss"] < before - 0.1


def test_bad_kind(net):
    with pytest.raises(InvalidArgument, match="gradient_quantizer must be one of"):
        GradientQuantization(net, 4, "best")
