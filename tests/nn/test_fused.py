"""A layer and its quantizers as one node, against the same layer put together from its parts."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hub_mpq.nn import convolutions, layers
from hub_mpq.nn.quantize import quantize_layer
from hub_mpq.quantizers import LSQ, activation_scale, weight_scale_mse


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gpt2_layer():
    from transformers.pytorch_utils import Conv1D

    return Conv1D(6, 10)


CASES = {
    "convolution": (lambda: nn.Conv2d(6, 8, 3, 2, 1), (4, 6, 9, 9), 0),
    "no bias, dilated": (lambda: nn.Conv2d(6, 8, 3, dilation=2, bias=False), (4, 6, 9, 9), 0),
    "groups": (lambda: nn.Conv2d(6, 6, 3, groups=6), (4, 6, 9, 9), 0),
    "padded apart": (lambda: nn.Conv2d(6, 8, 3, padding="same", padding_mode="reflect"), (4, 6, 9, 9), 0),
    "linear": (lambda: nn.Linear(10, 6), (4, 10), 0),
    "linear, three axes": (lambda: nn.Linear(10, 6, bias=False), (4, 7, 10), 0),
    "conv1d": (gpt2_layer, (4, 7, 10), 1),
}


def build(name, signed_input=False, per_channel=True, bits=(4, 4)):
    """(quantized layer, input): one input scale, weight scales per channel or one."""
    make, shape, axis = CASES[name]
    layer, x = make(), draw(*shape)
    with torch.no_grad():
        layer.weight.copy_(draw(*layer.weight.shape, seed=1) * 0.2)
    x = x if signed_input else x.relu()
    weight = LSQ((2, 4, 8), signed=True, channels=layer.weight.shape[axis] if per_channel else 1, axis=axis)
    inputs = LSQ((2, 4, 8), signed=False)
    for b in (2, 4, 8):
        weight.init(b, weight_scale_mse(layer.weight, b, axis=axis if per_channel else None))
        inputs.init(b, *activation_scale(x, b, mse=True))
    for quantizer, width in ((weight, bits[0]), (inputs, bits[1])):
        quantizer.set_width(width)
        nn.init.normal_(quantizer.shift, std=0.1, generator=torch.Generator().manual_seed(2))
    return quantize_layer(layer, name, weight, inputs), x


def learn(layer, x, monkeypatch, fused, dtype=None):
    """(output, {what: gradient}) of one pass."""
    layer, x = copy.deepcopy(layer), x.clone().requires_grad_()
    with monkeypatch.context() as m:
        if not fused:
            for module in (layers, convolutions):
                m.setattr(module, "fused_output", lambda *_: None)
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            out = layer(x)
        (out.float() * draw(*out.shape, seed=3)).sum().backward()
    return out, {"x": x.grad, **{n: p.grad for n, p in layer.named_parameters()}}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("bits", [(4, 4), (2, 8), (None, 4), (4, None), (None, None)])
@pytest.mark.parametrize("signed_input", [True, False])
def test_equals_its_parts(name, per_channel, bits, signed_input, monkeypatch):
    layer, x = build(name, signed_input, per_channel, bits)
    want, theirs = learn(layer, x, monkeypatch, fused=False)
    got, ours = learn(layer, x, monkeypatch, fused=True)
    assert torch.equal(got, want)
    assert ours.keys() == theirs.keys()
    for what, grad in theirs.items():
        assert (ours[what] is None) == (grad is None), what
        if grad is not None:
            torch.testing.assert_close(ours[what], grad, rtol=1e-6, atol=1e-6, msg=lambda m, w=what: f"{w}: {m}")


@pytest.mark.parametrize("name", ["convolution", "linear, three axes", "conv1d"])
def test_equals_its_parts_under_autocast(name, monkeypatch):
    layer, x = build(name)
    want, theirs = learn(layer, x, monkeypatch, fused=False, dtype=torch.bfloat16)
    got, ours = learn(layer, x, monkeypatch, fused=True, dtype=torch.bfloat16)
    assert got.dtype == want.dtype == torch.bfloat16
    assert torch.equal(got, want)
    for what, grad in theirs.items():
        assert ours[what].dtype == grad.dtype == torch.float32
        # both multiply in bfloat16 (8 bits) and may add in another order
        torch.testing.assert_close(ours[what], grad, rtol=1e-2, atol=1e-2 * grad.abs().max().item())


@pytest.mark.parametrize("name", ["convolution", "linear"])
def test_a_model_in_bfloat16(name, monkeypatch):
    layer, x = build(name)
    layer, x = layer.to(torch.bfloat16), x.to(torch.bfloat16)
    want, theirs = learn(layer, x, monkeypatch, fused=False)
    got, ours = learn(layer, x, monkeypatch, fused=True)
    assert torch.equal(got, want)
    for what, grad in theirs.items():
        assert ours[what].dtype == (torch.float32 if "shift" in what else torch.bfloat16)
        torch.testing.assert_close(ours[what], grad, rtol=1e-2, atol=1e-2 * grad.abs().max().item())


@pytest.mark.parametrize("frozen", ["weight", "bias", "weight_quantizer.shift", "input_quantizer.shift"])
def test_frozen_parameters_get_no_gradient_and_the_others_the_same(frozen, monkeypatch):
    layer, x = build("convolution")
    free = learn(layer, x, monkeypatch, fused=True)[1]
    layer.get_parameter(frozen).requires_grad_(False)
    kept = learn(layer, x, monkeypatch, fused=True)[1]
    assert kept.pop(frozen) is None
    for what, grad in kept.items():
        torch.testing.assert_close(grad, free[what], rtol=1e-6, atol=1e-6)


def test_no_gradient_asked_for():
    layer, x = build("linear")
    want = layer(x)
    with torch.no_grad():
        assert torch.equal(layer(x), want)
    with torch.inference_mode():
        assert torch.equal(layer(x), want)
    assert torch.equal(layer.requires_grad_(False)(x), want)


def test_one_layer_used_twice_adds_its_gradients():
    layer, x = build("linear")
    y = draw(4, 10, seed=5)
    (layer(x) + layer(y)).sum().backward()
    both = {n: p.grad.clone() for n, p in layer.named_parameters()}
    layer.zero_grad()
    for each in (x, y):
        layer(each).sum().backward()
    for n, p in layer.named_parameters():
        torch.testing.assert_close(p.grad, both[n], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["convolution", "linear", "conv1d"])
def test_only_the_float_input_and_weight_are_kept(name):
    layer, x = build(name)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x.requires_grad_())
    large = {t.data_ptr() for t in kept if t.numel() > layer.weight_quantizer.base.numel()}
    assert large == {x.data_ptr(), layer.weight.data_ptr()}


def test_gradient_checkpointing_and_an_input_changed_in_place():
    layer, x = build("convolution")
    x.requires_grad_()
    layer(x).sum().backward()
    want, x.grad = x.grad, None
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert torch.equal(x.grad, want)
    y = x.detach().clone()
    out = layer(y)
    y.mul_(2)
    with pytest.raises(RuntimeError, match="inplace"):
        out.sum().backward()


def test_quantizers_that_are_off_leave_second_derivatives():
    layer, x = build("linear", bits=(None, None))
    (grad,) = torch.autograd.grad(layer(x).square().sum(), layer.weight, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), layer.weight)
    assert second.abs().sum() > 0


def test_a_compiled_model_takes_the_same_step():
    """Under torch.compile the layer is its parts, for the compiler to fuse."""
    layer, x = build("linear")
    traced = copy.deepcopy(layer)
    # the back end that runs what was traced as it is: no C++ compiler needed
    out = torch.compile(traced, backend="aot_eager")(x)
    assert torch.equal(out, layer(x))
    out.sum().backward()
    layer(x).sum().backward()
    for (n, a), (_, b) in zip(traced.named_parameters(), layer.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-6, msg=n)
