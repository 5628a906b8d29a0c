"""Convolutions over one to three axes, ordinary and transposed, in all of their forms."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hub_mpq import HubMPQ
from hub_mpq.adapters import build_graph
from hub_mpq.core import LayerBits, Policy
from hub_mpq.core.layer_kind import layer_kinds
from hub_mpq.cost.size import channel_count, packed_nbytes
from hub_mpq.nn import convolutions, layers
from hub_mpq.nn.calibrate import calibrate_inputs, calibrate_weights
from hub_mpq.nn.packed import float_layer, packed_layer
from hub_mpq.nn.packing import packed_weight
from hub_mpq.nn.quantize import quantize_to_policy
from hub_mpq.pack import pack_weight
from hub_mpq.train.round_weights import round_weight

SIZES = {1: (9,), 2: (7, 6), 3: (5, 5, 6)}
KINDS = {
    nn.Conv1d: "convolution1d",
    nn.Conv2d: "conv2d",
    nn.Conv3d: "convolution3d",
    nn.ConvTranspose1d: "conv_transpose1d",
    nn.ConvTranspose2d: "conv_transpose2d",
    nn.ConvTranspose3d: "conv_transpose3d",
}
PLAIN = [
    {},
    {"stride": 2, "padding": 1, "groups": 2},
    {"dilation": 2, "bias": False},
    {"padding": "same", "padding_mode": "reflect"},
    {"padding": "valid"},
    {"padding": 1, "padding_mode": "circular", "groups": 4},
    {"padding": 1, "padding_mode": "replicate"},
]
TRANSPOSED = [
    {},
    {"stride": 2, "padding": 1, "output_padding": 1},
    {"dilation": 2, "groups": 2, "bias": False},
    {"stride": 2, "groups": 4},
]
CASES = [
    *((cls, o) for cls in (nn.Conv1d, nn.Conv2d, nn.Conv3d) for o in PLAIN),
    *((cls, o) for cls in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d) for o in TRANSPOSED),
]


def case(cls, options):
    """(float layer in a net, an input with a batch axis)."""
    torch.manual_seed(0)
    axes = int(cls.__name__[-2])
    return nn.Sequential(cls(4, 8, 3, **options)).eval(), torch.randn(2, 4, *SIZES[axes])


def quantized(net, x, level="W4A8"):
    graph = build_graph(net, x, model_id="net")
    net = copy.deepcopy(net)
    quantize_to_policy(net, graph, Policy.uniform(graph.with_fixed({"0": None}), level))
    calibrate_weights(net, mse=True)
    calibrate_inputs(net, {"0": x}, mse=False)
    return net, graph["0"]


def packed(net, spec):
    """The packed form of a quantized layer."""
    layer = net[0]
    tensors = packed_weight(layer, spec.kind).parts()
    tensors["input_scale"] = layer.input_quantizer.scale.detach()
    tensors["input_zero_point"] = torch.tensor([layer.input_quantizer.zero_point])
    bits = LayerBits(layer.weight_quantizer.spec.num_bits, layer.input_quantizer.spec.num_bits)
    return packed_layer(float_form(layer), spec, bits, tensors, dtype=torch.float32)


def float_form(layer):
    out = layers.take_over(layer.float_class, layer)
    out._modules.clear()
    layers.call_only(out, False)
    return out


@pytest.mark.parametrize(("cls", "options"), CASES)
def test_counts_are_torchs_own(cls, options):
    net, x = case(cls, options)
    (layer,) = build_graph(net, x, model_id="net")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(x[:1])
    assert layer.kind == KINDS[cls]
    assert 2 * layer.macs == counter.get_total_flops()


@pytest.mark.parametrize(("cls", "options"), CASES)
def test_without_widths_it_is_the_float_layer(cls, options):
    net, x = case(cls, options)
    q, _ = quantized(net, x)
    q[0].weight_quantizer.set_width(None)
    q[0].input_quantizer.set_width(None)
    assert torch.equal(q(x), net(x))


@pytest.mark.parametrize(("cls", "options"), CASES)
def test_one_operator_equals_its_parts(cls, options, monkeypatch):
    """Output and all gradients, with and without a batch axis."""
    net, x = case(cls, options)
    q, _ = quantized(net, x)
    found = []
    for apart in (False, True):
        with monkeypatch.context() as m:
            if apart:
                m.setattr(convolutions, "fused_output", lambda *_: None)
            each, one = copy.deepcopy(q), x.clone().requires_grad_()
            out = each(one)
            weight = torch.linspace(-1, 1, out.numel()).view_as(out)
            (out * weight).sum().backward()
            grads = {name: p.grad for name, p in each.named_parameters()}
            assert all(g is not None for g in grads.values())
            found.append({"out": out, "x": one.grad, **grads})
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], msg=name)
    if options.get("padding_mode", "zeros") == "zeros":  # torch pads one sample without a batch axis by zeros only
        torch.testing.assert_close(q(x[0]), q(x)[0])


@pytest.mark.parametrize("bits", [1, 3, 8])
@pytest.mark.parametrize(("cls", "options"), CASES)
def test_packed_is_quantized_to_the_bit(cls, options, bits):
    net, x = case(cls, options)
    q, spec = quantized(net, x, f"W{bits}A8")
    p = packed(q, spec)
    with torch.no_grad():
        assert torch.equal(p(x), q(x))
    assert isinstance(p, cls)
    assert p._buffers["weight_packed"].numel() * 4 == packed_nbytes(spec.kind, spec.weight_shape, bits)
    assert torch.equal(float_layer(p, torch.float32).weight, q[0].weight_quantizer(q[0].weight))
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    p(a).square().sum().backward()
    q(b).square().sum().backward()
    torch.testing.assert_close(a.grad, b.grad)
    if q[0].bias is not None:
        torch.testing.assert_close(p.bias.grad, q[0].bias.grad)


@pytest.mark.parametrize("cls", [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d])
def test_a_wanted_output_size_is_met(cls):
    net, x = case(cls, {"stride": 2})
    q, spec = quantized(net, x)
    p = packed(q, spec)
    size = [2 * n + 2 for n in x.shape[2:]]
    want = net[0](x, output_size=size).shape
    assert list(want[2:]) == size
    for layer in (q[0], p):
        assert layer(x, size).shape == layer(x, output_size=size).shape == want
        assert torch.equal(layer(x, size), layer(input=x, output_size=size))


@pytest.mark.parametrize("cls", [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d])
def test_each_output_channel_of_a_transposed_one_has_a_scale(cls):
    """A channel that is a thousand times smaller keeps its values; groups share the scales of their places."""
    net, x = case(cls, {})
    with torch.no_grad():
        net[0].weight[:, 3] /= 1000
    q, spec = quantized(net, x, "W8A8")
    assert q[0].weight_quantizer.scale.shape == (8,) == (channel_count(spec.kind, spec.weight_shape),)
    rounded, weight = q[0].weight_quantizer(q[0].weight)[:, 3], net[0].weight[:, 3]
    assert (rounded - weight).abs().max() < 0.02 * weight.abs().max()
    grouped, spec = quantized(*case(cls, {"groups": 2}))
    assert grouped[0].weight_quantizer.scale.shape == (4,) == (channel_count(spec.kind, spec.weight_shape),)


@pytest.mark.parametrize("kind", ["conv_transpose1d", "conv_transpose2d", "conv_transpose3d"])
def test_the_stream_is_that_of_the_exchanged_weight(kind):
    shape = (3, 5, 2, 4, 1)[: 2 + int(kind[-2])]
    values = torch.randint(-8, 8, shape, dtype=torch.int8)
    scale = torch.rand(5) + 0.1
    words = pack_weight(values, scale, kind, 4).weight_packed
    plain = pack_weight(values.transpose(0, 1).contiguous(), scale, "conv2d", 4)
    assert torch.equal(words, plain.weight_packed)


def test_rounding_to_nearest_follows_the_output_channels():
    net, x = case(nn.ConvTranspose2d, {})
    (layer,) = build_graph(net, x, model_id="net")
    level = LayerBits(3, 8)
    found = round_weight(net[0].weight.detach(), layer, [level])[level]
    q, _ = quantized(net, x, "W3A8")
    assert torch.equal(found.dequantize(), q[0].weight_quantizer(q[0].weight))


class Net(nn.Module):
    """All kinds, as a network that is trained."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv1d(3, 8, 3, padding="same")
        self.b = nn.ConvTranspose1d(8, 6, 3, stride=2, groups=2, output_padding=1)
        self.c = nn.ConvTranspose2d(1, 4, 3)
        self.d = nn.Conv3d(4, 4, (1, 2, 2))
        self.e = nn.ConvTranspose3d(4, 2, 2, bias=False)
        self.head = nn.Linear(2, 3)

    def forward(self, x):
        x = self.c(self.b(self.a(x).relu())[:, None])
        return self.head(self.e(self.d(x[:, :, None])).mean((2, 3, 4)))


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_the_whole_route(tmp_path, rounding):
    torch.manual_seed(0)
    net, x, labels = Net().eval(), torch.randn(8, 3, 9), torch.arange(8) % 3
    mpq = HubMPQ.from_module(net, x)
    assert {layer.kind for layer in mpq.graph} == {*KINDS.values()} - {"conv2d"} | {"linear"}
    assert not mpq.graph.floats
    mpq.quantize({"weight_bits": 5}, train=[(x, labels)], epochs=1, rounding=rounding)
    assert mpq.save_pretrained(tmp_path) == (tmp_path / "model.mpq.safetensors").stat().st_size
    again = HubMPQ.from_pretrained(tmp_path, module=Net().eval())
    assert torch.equal(again.model(x), mpq.model(x))
    for runtime in ("torch", "onednn"):
        torch.testing.assert_close(mpq.to_runtime(runtime)(x), mpq.model(x))


def test_a_runtime_that_lacks_a_kind_says_so():
    from hub_mpq.runtime.integer_layer import integer_layers

    torch.manual_seed(0)
    x = torch.randn(2, 3, 9)
    mpq = HubMPQ.from_module(Net().eval(), x)
    mpq.apply_policy("W7A8", [(x,)])
    found, kept = integer_layers(mpq.model)
    assert set(found) == {"head"}
    assert kept == {name: f"{mpq.graph[name].kind} layers have no integer form" for name in "abcde"}


def test_every_kind_of_convolution_is_known_here():
    named = {kind.name for kind in layer_kinds if ".convolutions:" in str(kind.quantized)}
    assert named == set(KINDS.values())
