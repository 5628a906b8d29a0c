"""Sums by bit planes are those of 64-bit integers, for every pair of widths; and models run on them."""

import sys

import pytest
import torch
from runtime_toys import bert, noise, quantized, timm_net, tokens
from torch import nn
from torch.nn import functional as F
from transformers import BertForSequenceClassification

from hub_mpq.core import LayerBits, LayerSpec
from hub_mpq.errors import HubMPQError
from hub_mpq.quantizers.binary_decomposition import Codes, binary_conv2d, binary_linear
from hub_mpq.runtime import bit_serial, bit_serial_vectors, certify, to_runtime
from hub_mpq.runtime.bit_serial import BitSerial, BitSerialLayer, weight_planes, words
from hub_mpq.runtime.certificate import LayerRun, check_layer
from hub_mpq.runtime.exchanged import Exchanged
from hub_mpq.runtime.fused_layer import Activation, FusedLayer
from hub_mpq.runtime.integer_layer import Grid, IntegerLayer

pytest.importorskip("numba")

WIDTHS = range(1, 9)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def always_integers(monkeypatch):
    """No layer is too slow for integers."""
    monkeypatch.setattr("hub_mpq.runtime.in_process._Engine._both_ways", lambda *_: (0.0, 1.0))


def weights(bits, shape, generator):
    low = -(2 ** (bits - 1))
    codes = torch.randint(low, -low, shape, generator=generator)
    return (2 * codes + 1 if bits == 1 else codes).to(torch.int8)


def layer_of(weight, bits, x_bits, zero=0, **convolution):
    """Scales are 1, so that the output is the sum."""
    grid = Grid(1.0, zero, x_bits)
    return IntegerLayer("layer", weight, bits, torch.ones(len(weight)), None, grid, **convolution)


def inputs(x_bits, shape, generator):
    return torch.randint(2**x_bits, shape, dtype=torch.uint8, generator=generator)


def zero_points(bits):
    return {0, 2**bits // 3, 2**bits - 1}


def product(layer, codes):
    """The 64-bit integer product, then rounded to float32 once."""
    x, weight = codes.long() - layer.grid.zero_point, layer.weight.long()
    if not layer.convolution:
        return (x @ weight.T).float()
    # float64 holds sums of these sizes exactly; torch has no integer convolution
    y = F.conv2d(
        layer.padded(x.double()), weight.double(), None, layer.stride, layer.padding, layer.dilation, layer.groups
    )
    assert y.abs().max() < 2**53
    return y.long().float()


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("length", [1, 33, 64, 200])
def test_linear(bits, length, generator):
    for x_bits in WIDTHS:
        for zero in zero_points(x_bits):
            layer = layer_of(weights(bits, (11, length), generator), bits, x_bits, zero)
            codes = inputs(x_bits, (2, 5, length), generator)
            assert torch.equal(BitSerialLayer(FusedLayer(layer))(codes), product(layer, codes)), (x_bits, zero)


@pytest.mark.parametrize("bits", WIDTHS)
def test_linear_is_the_decomposition_of_ebs(bits, generator):
    for x_bits in WIDTHS:
        zero = 2**x_bits // 3
        layer = layer_of(weights(bits, (7, 70), generator), bits, x_bits, zero)
        codes = inputs(x_bits, (4, 70), generator)
        want = binary_linear(codes.long() - zero, layer.weight.long(), Codes(x_bits, -zero), Codes.signed(bits))
        assert torch.equal(BitSerialLayer(FusedLayer(layer))(codes), want.float())


CONVOLUTIONS = {
    "3x3": (64, 16, 3, {"padding": (1, 1)}),
    "words and a rest": (72, 9, 3, {"padding": (1, 1)}),
    "two words, stride": (128, 8, 3, {"padding": (1, 1), "stride": (2, 2)}),
    "no padding": (3, 5, 5, {"stride": (2, 1)}),
    "uneven": (64, 10, (3, 1), {"padding": (2, 0), "stride": (1, 2), "dilation": (2, 1)}),
    "dilation": (64, 8, 3, {"padding": (2, 2), "dilation": (2, 2)}),
    "dilation, one axis": (64, 8, 3, {"padding": (3, 1), "dilation": (3, 1)}),
    "pointwise": (40, 24, 1, {}),
    "same": (64, 8, 3, {"same": True, "stride": (2, 2)}),
    "groups": (24, 18, 3, {"padding": (1, 1), "groups": 3}),
    "groups of words": (128, 16, 3, {"padding": (1, 1), "groups": 2}),
    "depthwise": (10, 10, 3, {"padding": (1, 1), "groups": 10}),
    "depthwise, two outputs each": (6, 12, 5, {"padding": (2, 2), "stride": (2, 2), "groups": 6}),
}


def convolution(name, bits, x_bits, zero, generator):
    """(layer, codes of an input of odd sizes)."""
    channels, outputs, kernel, options = CONVOLUTIONS[name]
    kernel = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    weight = weights(bits, (outputs, channels // options.get("groups", 1), *kernel), generator)
    layer = layer_of(weight, bits, x_bits, zero, **{"stride": (1, 1), "padding": (0, 0), **options})
    return layer, inputs(x_bits, (2, channels, 9, 7), generator)


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_convolution(name, bits, generator):
    for x_bits in WIDTHS:
        for zero in zero_points(x_bits):
            layer, codes = convolution(name, bits, x_bits, zero, generator)
            found = BitSerialLayer(FusedLayer(layer))(codes)
            assert torch.equal(found, product(layer, codes)), (x_bits, zero)


@pytest.mark.parametrize("name", ["3x3", "words and a rest", "depthwise"])
def test_convolution_is_the_decomposition_of_ebs(name, generator):
    for bits in WIDTHS:
        for x_bits in WIDTHS:
            zero = 2**x_bits // 3
            layer, codes = convolution(name, bits, x_bits, zero, generator)
            options = {"padding": layer.padding, "groups": layer.groups}
            operands = codes.long() - zero, layer.weight.long(), Codes(x_bits, -zero), Codes.signed(bits)
            want = binary_conv2d(*operands, **options)
            assert torch.equal(BitSerialLayer(FusedLayer(layer))(codes), want.float())


def test_sums_of_32_bits(generator):
    layer = layer_of(weights(8, (9, 60000), generator), 8, 8, 200)
    assert layer.largest_sum() < 2**31
    codes = inputs(8, (3, 60000), generator)
    layer.weight[0], codes[0] = 127, 255
    assert torch.equal(BitSerialLayer(FusedLayer(layer))(codes), product(layer, codes))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_memory_formats_and_empty_batches(memory_format, generator):
    layer, codes = convolution("3x3", 2, 3, 1, generator)
    made = BitSerialLayer(FusedLayer(layer))
    assert torch.equal(made(codes.contiguous(memory_format=memory_format)), product(layer, codes))
    assert made(codes[:0]).shape == (0, 16, 9, 7)


def test_other_popcounts_count_the_same(generator, monkeypatch):
    """CPUs that count bits of bytes, or of halves of them, take another way."""
    usual = bit_serial_vectors.counts_words()
    monkeypatch.setattr(bit_serial_vectors, "counts_words", lambda: not usual)
    bit_serial.kernels.cache_clear()
    try:
        layer = layer_of(weights(3, (20, 64 * 70 + 3), generator), 3, 2, 1)  # more words than a byte's count can hold
        codes = inputs(2, (5, 64 * 70 + 3), generator)
        codes[0], layer.weight[0] = 3, -1  # all bits of all planes
        assert torch.equal(BitSerialLayer(FusedLayer(layer))(codes), product(layer, codes))
    finally:
        bit_serial.kernels.cache_clear()


def test_threads_share_the_pixels(generator):
    layer, codes = convolution("3x3", 2, 2, 1, generator)
    codes = codes.repeat(3, 1, 1, 1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(BitSerialLayer(FusedLayer(layer))(codes), product(layer, codes))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["3x3", "words and a rest", "depthwise", "pointwise"])
@pytest.mark.parametrize("activation", [None, Activation("relu"), Activation("clip", -2.0, 5.0)])
@pytest.mark.parametrize("follows", ["float", "codes", "sum"])
def test_what_a_layer_takes_along(name, activation, follows, generator):
    layer, codes = convolution(name, 2, 3, 3, generator)
    scale = torch.rand(len(layer.weight), generator=generator) / 20
    bias = torch.randn(len(layer.weight), generator=generator)
    layer = IntegerLayer(**{**vars(layer), "scale": scale, "bias": bias, "grid": Grid(0.37, 3, 3)})
    output = Grid(0.21, 5, 4) if follows == "codes" else None
    plan = FusedLayer(layer, activation=activation, adds=follows == "sum", output=output)
    summand = torch.randn(product(layer, codes).shape, generator=generator) if plan.adds else None
    found = BitSerialLayer(plan)(codes, *([summand] if plan.adds else []))
    assert found.dtype == (torch.uint8 if output else torch.float32)
    check = check_layer(LayerRun(plan, codes, found, summand))
    assert check.wrong == 0
    assert check.error < 1e-6
    assert check.flips <= 1


def test_planes_are_as_few_as_the_codes_need():
    def count(*codes):
        planes, factors, one_bit = weight_planes(torch.tensor(codes, dtype=torch.int8))
        made = sum(factor * plane for factor, plane in zip(factors, planes.long(), strict=True)) - int(one_bit)
        assert made.tolist() == list(codes)
        return len(planes)

    assert count(-1, 1, 1) == 1
    assert count(-1, 0, 1) == 2
    assert count(0, 1, 3) == 2
    assert count(-8, 7, 0) == 4
    assert count(-128, 127) == 8
    assert count(0, 0) == 1


def test_words_start_at_the_lowest_bit():
    bits = torch.zeros(70, dtype=torch.uint8)
    bits[[0, 3, 63, 64]] = 1
    assert words(bits).tolist() == [1 + 8 - 2**63, 1]


def test_menu_has_every_pair_where_sums_fit():
    small = BitSerial().menu(LayerSpec("a", "conv2d", (64, 64, 3, 3), 1, 64 * 64 * 9, 1))
    assert small == tuple(sorted(LayerBits(w, a) for w in WIDTHS for a in WIDTHS))


NETS = {"resnet18": 32, "mobilenetv2_050": 32, "tf_efficientnet_lite0": 32, "vit_tiny_patch16_224": 64}


@pytest.mark.parametrize(("name", "size"), NETS.items())
def test_timm_networks(always_integers, name, size):
    net = timm_net(name, size, **({"img_size": size} if "vit" in name else {}))
    mpq = quantized(net, "W2A2", noise(4, 3, size, size))
    module = to_runtime(mpq.model, "bit_serial", noise(1, 3, size, size))
    assert len(module.runtime_layers.integer) > 15
    assert not module.runtime_layers.float
    found = certify(mpq.model, module, [noise(3, 3, size, size, seed=1)])
    assert found.exact
    assert found.total.codes > 0


def test_norms_activations_and_sums_go_into_the_layers(always_integers):
    mpq = quantized(timm_net("resnet18"), "W1A1", noise(4, 3, 32, 32))
    module = to_runtime(mpq.model, "bit_serial", noise(1, 3, 32, 32))
    assert not any(isinstance(part, (nn.BatchNorm2d, nn.ReLU)) for part in module.modules())
    plans = [part.plan for part in module.modules() if isinstance(part, BitSerialLayer)]
    assert sum(plan.adds for plan in plans) == 8
    assert any(plan.output is not None for plan in plans)


def test_a_hugging_face_encoder(always_integers):
    mpq = quantized(bert(), "W1A2", tokens())
    module = to_runtime(mpq.model, "bit_serial", tokens())
    assert isinstance(module, BertForSequenceClassification)
    assert sum(isinstance(part, Exchanged) for part in module.modules()) == len(module.runtime_layers.integer) > 10
    assert certify(mpq.model, module, [tokens(3, 7)]).exact


def test_layers_that_are_faster_in_float_compute_so(monkeypatch, generator):
    monkeypatch.setattr("hub_mpq.runtime.in_process._Engine._both_ways", lambda *_: (2.0, 1.0))
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    x = noise(2, 3, 16, 16)
    mpq = quantized(net, "W2A2", x)
    module = to_runtime(mpq.model, "bit_serial", x)
    assert not module.runtime_layers.integer
    torch.testing.assert_close(module(x), mpq.model(x))


def test_without_numba_it_says_what_to_install(monkeypatch, generator):
    monkeypatch.setitem(sys.modules, "numba", None)
    net = nn.Sequential(nn.Linear(8, 8))
    x = noise(2, 8)
    mpq = quantized(net, "W2A2", x)
    with pytest.raises(HubMPQError, match=r"hub-mpq\[bit-serial\]"):
        to_runtime(mpq.model, "bit_serial", x)
