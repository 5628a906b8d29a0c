"""Weights of every kind and width come back to the bit, and dequantize to integer · scale."""

import pytest
import torch

from hub_mpq.cost.size import channel_count, packed_nbytes
from hub_mpq.errors import InvalidArgument
from hub_mpq.pack import PackedTensor, empty_packed, pack_weight

SHAPES = [
    ("conv2d", (4, 3, 3, 3)),
    ("conv2d", (33, 1, 3, 3)),
    ("conv2d", (2, 2, 1, 1)),
    ("linear", (5, 13)),
    ("linear", (8, 64)),
    ("linear", (0, 4)),
    ("conv1d", (13, 5)),
    ("embedding", (7, 1)),
]


def weight(shape, bits):
    rng = torch.Generator().manual_seed(bits)
    if bits == 1:
        return torch.randint(0, 2, shape, generator=rng, dtype=torch.int8) * 2 - 1
    return torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, generator=rng, dtype=torch.int8)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("kind", "shape"), SHAPES)
@pytest.mark.parametrize("per_channel", [True, False])
def test_round_trip(kind, shape, bits, per_channel):
    value = weight(shape, bits)
    scale = (
        torch.rand(channel_count(kind, shape) if per_channel else 1, generator=torch.Generator().manual_seed(0)) + 0.01
    )
    packed = pack_weight(value, scale, kind, bits)
    assert packed.weight_packed.numel() * 4 == packed_nbytes(kind, shape, bits)
    assert packed.unpack().dtype == torch.int8
    assert torch.equal(packed.unpack(), value)
    assert packed.unpack().is_contiguous()
    along = (1, -1) if kind == "conv1d" else (-1, *(1,) * (len(shape) - 1))
    want = value.to(torch.float32) * scale.view(along)
    assert packed.dequantize().dtype == torch.float32
    assert torch.equal(packed.dequantize(), want)
    assert packed.dequantize().is_contiguous()
    empty = empty_packed(kind, shape, bits, per_channel=per_channel)
    assert {k: (v.shape, v.dtype) for k, v in empty.parts().items()} == {
        k: (v.shape, v.dtype) for k, v in packed.parts().items()
    }


def test_zero_point_is_subtracted():
    value, scale = weight((3, 5), 4), torch.tensor([0.5, 0.25, 2.0])
    zero = torch.tensor([1, -2, 7], dtype=torch.int8)
    packed = pack_weight(value, scale, "linear", 4, zero)
    assert torch.equal(packed.dequantize(), (value.float() - zero[:, None].float()) * scale[:, None])
    assert set(packed.parts()) == {"weight_packed", "weight_scale", "weight_zero_point", "weight_shape"}


def test_rows_can_be_taken_without_unpacking_the_rest():
    value, scale = weight((9, 5), 3), torch.rand(9) + 0.1
    packed = pack_weight(value, scale, "embedding", 3)
    ids = torch.tensor([8, 0, 8])
    some = PackedTensor(packed.weight_packed[ids], scale[ids], (3, 5), 3, "embedding")
    assert torch.equal(some.dequantize(), packed.dequantize()[ids])


def test_other_memory_orders_pack_alike():
    value, scale = weight((6, 4, 3, 3), 5), torch.rand(6) + 0.1
    other = value.to(memory_format=torch.channels_last)
    assert torch.equal(
        pack_weight(other, scale, "conv2d", 5).weight_packed, pack_weight(value, scale, "conv2d", 5).weight_packed
    )


def test_bad_weights_are_refused():
    value, scale = weight((3, 5), 4), torch.ones(3)
    for bad in (float("nan"), float("inf"), 0.0, -1.0):
        with pytest.raises(InvalidArgument, match="finite and positive"):
            pack_weight(value, torch.tensor([1.0, bad, 1.0]), "linear", 4)
    with pytest.raises(InvalidArgument, match="weight_scale must be"):
        pack_weight(value, torch.ones(5), "linear", 4)
    with pytest.raises(InvalidArgument, match="only −1 and \\+1"):
        pack_weight(torch.tensor([[0, 1]]), torch.ones(1), "linear", 1)
    with pytest.raises(InvalidArgument, match="do not fit"):
        pack_weight(torch.tensor([[8]]), torch.ones(1), "linear", 4)
    with pytest.raises(InvalidArgument, match="must have an integer dtype"):
        pack_weight(value.float(), scale, "linear", 4)
    with pytest.raises(InvalidArgument, match="unknown layer kind"):
        pack_weight(value, scale, "conv7d", 4)
    with pytest.raises(InvalidArgument, match="two axes"):
        pack_weight(value[None], scale, "linear", 4)
    with pytest.raises(InvalidArgument, match="weight_zero_point"):
        pack_weight(value, scale, "linear", 4, torch.zeros(3))
    with pytest.raises(InvalidArgument, match="weight_packed must be"):
        PackedTensor(torch.zeros(3, 1, dtype=torch.int32), scale, (3, 9), 4, "linear")
