"""Dense bits against Python's own integers, and against words stated by compressed-tensors."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hub_mpq.errors import InvalidArgument
from hub_mpq.pack import pack_bits, unpack_bits


def reference(codes, bits):
    """Words of one stream, as signed 32-bit numbers: a single huge integer, cut into pieces."""
    stream = sum(code << (bits * k) for k, code in enumerate(codes))
    words = [(stream >> (32 * i)) & 0xFFFFFFFF for i in range(-(-len(codes) * bits // 32))]
    return [w - (1 << 32) if w >> 31 else w for w in words]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_ragged_streams_match_the_reference(data):
    bits = data.draw(st.integers(1, 8))
    rows, count = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 100))
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    codes = torch.randint(0, 2**bits, (rows, count), generator=rng)
    words = pack_bits(codes, bits)
    assert words.dtype == torch.int32
    assert words.tolist() == [reference(row, bits) for row in codes.tolist()]
    assert torch.equal(unpack_bits(words, bits, count).long(), codes)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("lead", [(), (1,), (3,), (2, 1), (0,)])
def test_every_ragged_count_returns(bits, lead):
    rng = torch.Generator().manual_seed(bits)
    for count in [*range(0, 70), 8 * 32768 + 5]:
        codes = torch.randint(0, 2**bits, (*lead, count), generator=rng, dtype=torch.uint8)
        assert torch.equal(unpack_bits(pack_bits(codes, bits), bits, count), codes)


# printed by pack_to_int32 of compressed_tensors 0.20 for the same int8 values
COMPRESSED_TENSORS = [
    (1, [-1, 0, 0, -1, 0], [22]),
    (2, [-2, -1, 0, 1] * 4, [-454761244]),
    (3, [-4, -3, -2, -1, 0, 1, 2, 3], [0x00FAC688]),
    (4, list(range(-8, 8)), [0x76543210, -19088744]),
    (5, [-16, 15, -1, 0, 1, 2, 3], [-451395616, 4]),
    (6, [-32, 31, -5, 17, 0, 1, 2], [1623572416, 552]),
    (7, [-64, 63, -1, 0, 1, 2], [403701632, 532]),
    (8, [-128, -1, 0, 127], [-8356096]),
]


@pytest.mark.parametrize(("bits", "values", "words"), COMPRESSED_TENSORS)
def test_words_of_compressed_tensors(bits, values, words):
    assert pack_bits(torch.tensor(values), bits, offset=2 ** (bits - 1)).tolist() == words
    assert (
        unpack_bits(torch.tensor(words, dtype=torch.int32), bits, len(values)).int() - 2 ** (bits - 1)
    ).tolist() == values


def test_what_does_not_fit_is_refused():
    with pytest.raises(InvalidArgument, match="-1 to 4 do not fit into 3 bits"):
        pack_bits(torch.tensor([-1, 4]), 3)
    with pytest.raises(InvalidArgument, match="do not fit"):
        pack_bits(torch.tensor([8]), 4, offset=8)
    with pytest.raises(InvalidArgument, match="integers"):
        pack_bits(torch.tensor([1.0]), 4)
    with pytest.raises(InvalidArgument, match="from 1 to 8"):
        pack_bits(torch.tensor([1]), 9)
    with pytest.raises(InvalidArgument, match=r"expected 2 int32 words .* got 1"):
        unpack_bits(torch.zeros(1, dtype=torch.int32), 5, 7)


def test_packing_leaves_its_input_alone():
    values = torch.arange(16, dtype=torch.uint8)
    words = pack_bits(values, 8)
    unpack_bits(words, 8, 16).fill_(0)
    assert values.tolist() == list(range(16))
    assert torch.equal(unpack_bits(words, 8, 16), values)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("bits", range(1, 9))
def test_a_gpu_gives_the_same_words_and_codes(bits):
    codes = torch.randint(0, 2**bits, (7, 45), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    words = pack_bits(codes, bits)
    assert torch.equal(pack_bits(codes.cuda(), bits).cpu(), words)
    assert torch.equal(unpack_bits(words.cuda(), bits, 45).cpu(), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_compiler_unpacks_the_same_codes(bits, monkeypatch):
    """There unpack_bits runs in plain operators."""
    for shape in ((1,), (31,), (3, 37), (2, 64), (0, 5), (2, 0)):
        codes = torch.randint(0, 1 << bits, shape, generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
        words = pack_bits(codes, bits)
        with monkeypatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            assert torch.equal(unpack_bits(words, bits, shape[-1]), codes)
