"""The decomposition equals the integer product for every pair of widths, signed and with zero points."""

import pytest
import torch
from torch.nn import functional as F

from hub_mpq.errors import InvalidArgument
from hub_mpq.quantizers import LSQ
from hub_mpq.quantizers.binary_decomposition import Codes, binary_conv2d, binary_linear, planes

WIDTHS = range(1, 9)


def draw(codes, shape, seed):
    code = torch.randint(2**codes.bits, shape, generator=torch.Generator().manual_seed(seed))
    return code * codes.factor + codes.low


def operands(kind, bits):
    if kind == "signed":
        return Codes.signed(bits)
    return Codes(bits, 0 if kind == "unsigned" else -(2**bits // 3))


@pytest.mark.parametrize("kind", ["signed", "unsigned", "zero-point"])
@pytest.mark.parametrize("weight_bits", WIDTHS)
def test_linear(weight_bits, kind):
    for x_bits in WIDTHS:
        a, b = operands(kind, x_bits), Codes.signed(weight_bits)
        x, w = draw(a, (2, 5, 33), x_bits), draw(b, (7, 33), 10 * weight_bits)
        assert torch.equal(binary_linear(x, w, a, b), x @ w.T)


@pytest.mark.parametrize(
    "shape",
    [
        {"stride": 1, "padding": 1},
        {"stride": 2, "padding": 0},
        {"stride": (2, 1), "padding": (2, 1), "dilation": 2},
        {"padding": 1, "groups": 2},
        {"padding": 1, "groups": 4},
    ],
)
def test_conv2d(shape):
    groups = shape.get("groups", 1)
    for weight_bits in WIDTHS:
        for x_bits in WIDTHS:
            kind = ("unsigned", "zero-point")[(weight_bits + x_bits) % 2]
            a, b = operands(kind, x_bits), Codes.signed(weight_bits)
            x, w = draw(a, (2, 4, 7, 6), x_bits), draw(b, (4, 4 // groups, 3, 3), weight_bits)
            want = F.conv2d(x.double(), w.double(), **shape).long()
            assert torch.equal(binary_conv2d(x, w, a, b, **shape), want)


@pytest.mark.parametrize("bits", WIDTHS)
def test_it_multiplies_what_the_quantizers_give(bits):
    generator = torch.Generator().manual_seed(bits)
    x, w = torch.randn(3, 16, generator=generator), torch.randn(5, 16, generator=generator)
    activation, weight = LSQ((bits,), signed=False), LSQ((bits,), signed=True)
    zero = 2**bits // 2
    activation.init(bits, torch.tensor([4 / 2**bits]), zero)
    weight.init(bits, torch.tensor([4 / 2**bits]))
    out = binary_linear(activation.to_int(x), weight.to_int(w), Codes(bits, -zero), Codes.signed(bits))
    scale = activation.scale * weight.scale
    torch.testing.assert_close(out * scale, activation(x) @ weight(w).T, rtol=1e-4, atol=1e-4)


def test_planes_add_up():
    codes = torch.arange(256)
    split = planes(codes, 8)
    assert set(split.unique().tolist()) == {0, 1}
    assert torch.equal(sum(split[i] << i for i in range(8)), codes)


def test_integers_outside_the_grid_are_refused():
    with pytest.raises(InvalidArgument, match="outside"):
        Codes.signed(3).encode(torch.tensor([4]))
    with pytest.raises(InvalidArgument, match="outside"):
        Codes.signed(1).encode(torch.tensor([0]))


@pytest.mark.parametrize("value", [1.7, float("nan"), float("inf")])
def test_what_is_no_integer_is_refused(value):
    with pytest.raises(InvalidArgument, match="must be made from integers"):
        Codes(4).encode(torch.tensor([1.0, value]))
    x, w = torch.full((1, 1, 3, 3), value), torch.ones(1, 1, 3, 3)
    with pytest.raises(InvalidArgument, match="must be made from integers"):
        binary_conv2d(x, w, Codes(4), Codes.signed(4))
    assert Codes(4).encode(torch.tensor([1.0, 15.0])).tolist() == [1, 15]


@pytest.mark.parametrize(
    ("x", "weight", "options", "match"),
    [
        ((1, 1, 4, 4), (1, 1, 3, 3), {"padding": "same"}, "padding must be one or two integers, got 'same'"),
        ((1, 1, 4, 4), (1, 1, 3, 3), {"stride": (1, 2, 3)}, "stride must be one or two integers"),
        ((1, 4, 4), (1, 1, 3, 3), {}, r"x \[N, C, H, W\].*got \[1, 4, 4\]"),
        ((1, 4, 4, 4), (2, 4, 3), {}, r"weight \[O, C/groups, kh, kw\].*\[2, 4, 3\]"),
        ((1, 4, 4, 4), (2, 3, 3, 3), {}, r"weight \[O, C/groups, kh, kw\]"),
        ((1, 4, 4, 4), (2, 4, 3, 3), {"groups": 0}, "a convolution with 0 groups"),
        ((1, 4, 4, 4), (3, 2, 3, 3), {"groups": 2}, r"weight \[O, C/groups, kh, kw\]"),
    ],
)
def test_a_convolution_refuses_other_shapes_in_words(x, weight, options, match):
    with pytest.raises(InvalidArgument, match=match):
        binary_conv2d(torch.zeros(x), torch.zeros(weight), Codes(4), Codes.signed(4), **options)
