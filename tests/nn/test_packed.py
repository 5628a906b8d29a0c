"""Packed layers: what passes through them, and what is kept for the way back."""

from __future__ import annotations

import pytest
import torch
from timm.layers import Conv2dSame
from torch import nn
from transformers.pytorch_utils import Conv1D

from hub_mpq import adapters
from hub_mpq.core import Policy
from hub_mpq.errors import HubMPQError, InvalidArgument
from hub_mpq.nn.calibrate import calibrate_inputs, calibrate_weights, sample_inputs
from hub_mpq.nn.packed import packed_layer, set_resident
from hub_mpq.nn.packing import packed_tensors
from hub_mpq.nn.quantize import quantize_to_policy
from hub_mpq.pack import Manifest
from hub_mpq.pack.layout import flatten
from hub_mpq.tasks import Embedding

IMAGE, TEXT = (4, 4, 9, 9), (5, 6, 16)
LAYERS = {
    "linear": (lambda: nn.Linear(16, 24), TEXT),
    "linear without a bias": (lambda: nn.Linear(16, 24, bias=False), TEXT),
    "conv1d": (lambda: Conv1D(24, 16), TEXT),
    "conv2d": (lambda: nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2), IMAGE),
    "depthwise conv2d": (lambda: nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4, bias=False), IMAGE),
    "reflecting conv2d": (lambda: nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"), IMAGE),
    "conv2d of timm": (lambda: Conv2dSame(4, 8, 3, stride=2), IMAGE),
}


def both(name, level="W3A4", dtype=torch.float32):
    """(the layer with quantizers, the same one packed, an input) of a layer in the table."""
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    net, x = nn.Sequential(make()), torch.randn(shape)
    graph = adapters.from_module(net, x).graph.with_fixed({"*": None})
    policy = Policy.uniform(graph, level)
    quantize_to_policy(net, graph, policy)
    calibrate_weights(net, mse=True)
    calibrate_inputs(net, sample_inputs(net, [x], Embedding().forward), mse=True)
    flat = flatten(packed_tensors(net, Manifest("net", None, graph.library, graph, policy)))
    parts = {key.rpartition(".")[2]: tensor for key, tensor in flat.items()}
    float_module = make()
    float_module.load_state_dict({k: v for k, v in net[0].state_dict().items() if "quantizer" not in k})
    packed = packed_layer(float_module, graph["0"], policy.bits["0"], parts, dtype=dtype)
    return net[0], packed, x


@pytest.mark.parametrize("level", ["W3A4", "W4A32", "W1A8"])
@pytest.mark.parametrize("name", LAYERS)
def test_outputs_and_gradients_are_those_of_the_layer_with_quantizers(name, level):
    quantized, packed, x = both(name, level)
    given = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    out = [layer(value) for layer, value in zip((quantized, packed), given, strict=True)]
    assert torch.equal(out[0], out[1])
    with torch.no_grad():
        assert torch.equal(packed(x), out[1])
    g = torch.randn_like(out[0])
    for value in out:
        value.backward(g)
    torch.testing.assert_close(given[1].grad, given[0].grad)
    assert given[1].grad.abs().sum() > 0
    if packed.bias is not None:
        torch.testing.assert_close(packed.bias.grad, quantized.bias.grad)


@pytest.mark.parametrize("name", LAYERS)
def test_an_output_may_be_written_into(name):
    """Adapters add their part to it in place."""
    for layer in both(name)[:2]:
        x = both(name)[2].requires_grad_()
        out = layer(x)
        out += 1
        out.sum().backward()
        assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["linear", "conv1d", "conv2d"])
def test_no_float_weight_is_kept_for_the_way_back(name):
    _, packed, x = both(name)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        packed(x.requires_grad_())
    count = packed.weight.numel()
    assert kept
    assert all(t.numel() != count for t in kept), [t.shape for t in kept]


@pytest.mark.parametrize("name", ["linear", "conv1d", "conv2d"])
def test_biases_may_be_of_another_dtype(name):
    """PEFT's prepare_model_for_kbit_training makes every parameter float32, whatever the weights are computed in."""
    _, packed, x = both(name, dtype=torch.bfloat16)
    out = packed(x.to(torch.bfloat16).requires_grad_())
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert packed.bias.grad.dtype == torch.float32
    assert torch.equal(out, packed.to(torch.bfloat16)(x.to(torch.bfloat16)))


def test_what_is_written_into_a_weight_is_refused_rather_than_lost():
    _, packed, _ = both("linear")
    before = packed.weight.clone()
    zeros = torch.zeros(24, 16)
    for write in (
        lambda: packed.weight.zero_(),
        lambda: packed.weight.data.copy_(zeros),
        lambda: setattr(packed.weight, "data", zeros),
        lambda: setattr(packed, "weight", zeros),
        lambda: packed.weight.__setitem__(0, 0.0),
        lambda: nn.init.zeros_(packed.weight),
        lambda: packed.weight[0].fill_(1),
        lambda: packed.weight.data.view(-1).add_(1),
        lambda: packed.weight.t().detach().chunk(2)[1].zero_(),
        lambda: torch.add(zeros, 1, out=packed.weight),
        lambda: torch.add(zeros[0], 1, out=packed.weight[0]),
        lambda: setattr(packed, "weight", nn.Parameter(zeros)),
    ):
        with pytest.raises(HubMPQError, match="are read-only"):
            write()
    with pytest.raises(HubMPQError, match="are read-only"):
        packed.weight.data += 1
    packed.weight = packed.weight
    packed.weight.requires_grad = False
    packed.weight.data.requires_grad_(False)
    assert torch.equal(packed.weight, before)
    for computed in (packed.weight * 2, packed.weight.clone(), packed.weight[0].sum(), packed.weight.max(0).values):
        assert type(computed) is torch.Tensor
    assert torch.add(packed.weight, 1, out=zeros) is zeros
    assert zeros.add_(packed.weight) is zeros


def test_a_packed_layer_is_one_of_its_float_type():
    """Who looks for layers by type finds it: PEFT does."""
    for name in LAYERS:
        assert isinstance(both(name)[1], nn.Conv2d if "conv2d" in name else Conv1D if name == "conv1d" else nn.Linear)


@pytest.mark.parametrize("level", ["W3A4", "W4A32"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_resident_weight_changes_no_output(name, level):
    _, packed, x = both(name, level)
    state = {key: tensor.clone() for key, tensor in packed.state_dict().items()}
    before, weight = packed(x), packed.weight.clone()
    unpackings = []
    unpack = type(packed.packed).dequantize
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            type(packed.packed), "dequantize", lambda self, *args: unpackings.append(1) or unpack(self, *args)
        )
        set_resident(packed, "float")
        assert torch.equal(packed(x), before)
        assert torch.equal(packed(x), before)
        assert len(unpackings) == 1
        set_resident(packed, "packed")
        assert torch.equal(packed(x), before)
        assert len(unpackings) == 2
    assert packed.kept is None
    set_resident(packed, "float")
    assert torch.equal(packed.weight, weight)
    with pytest.raises(HubMPQError, match="are read-only"):
        packed.weight.zero_()
    assert packed.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in packed.state_dict().items())


def test_a_resident_weight_follows_the_dtype_of_the_model():
    _, packed, x = both("linear", "W4A32")
    _, other, _ = both("linear", "W4A32")
    set_resident(packed, "float")
    for dtype in (torch.bfloat16, torch.float32):
        packed.to(dtype)
        other.to(dtype)
        assert packed.kept.dtype == dtype
        assert torch.equal(packed(x.to(dtype)), other(x.to(dtype)))


def test_what_has_no_packed_layers_or_no_such_form_is_refused():
    _, packed, _ = both("linear")
    with pytest.raises(InvalidArgument, match="'packed' or 'float', got 'int8'"):
        set_resident(packed, "int8")
    with pytest.raises(InvalidArgument, match="Linear has no packed layers"):
        set_resident(nn.Linear(2, 2), "float")
