"""The learned scale without its unit: what it is at each width, and that nothing else of the tensor matters."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from hub_mpq import HubMPQ
from hub_mpq.core import Candidates
from hub_mpq.quantizers import LSQ, activation_scale, weight_scale_mse, weight_scale_sigma
from hub_mpq.quantizers.weight_grid import weight_grid
from hub_mpq.search.relative_power import relative_power
from hub_mpq.search.sensitivity import LEAST

X = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
WIDTHS = (1, 2, 3, 4, 8)


def gaussian(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def calibrated(x, *, signed=True, channels=1):
    quantizer = LSQ(WIDTHS, signed=signed, channels=channels)
    for bits in WIDTHS:
        if signed:
            quantizer.init(bits, weight_scale_mse(x, bits, axis=0 if channels > 1 else None))
        else:
            quantizer.init(bits, *activation_scale(x, bits, mse=True))
    quantizer.set_width(None)
    return quantizer


@pytest.mark.parametrize("channels", [1, 64])
def test_one_bit_of_a_gaussian_weight_counts_more_than_two(channels):
    """The raw scale says the opposite: that of {-s, +s} is mean |w|."""
    weight = gaussian(64, 500)
    quantizer = calibrated(weight, channels=channels)
    raw = quantizer.scales.detach().square().mean(1).sqrt().tolist()
    assert raw[0] < raw[1]
    found = relative_power(quantizer, weight)
    values = [found[bits] for bits in WIDTHS]
    assert all(a > 1.5 * b for a, b in pairwise(values))
    assert found[1] == pytest.approx(12 * (1 - 2 / math.pi), rel=0.02)
    power = float(weight.square().mean())
    for bits, scale in list(zip(WIDTHS, raw, strict=True))[1:]:
        assert found[bits] == pytest.approx(scale**2 / power, rel=1e-5)
    assert quantizer.spec is None


def test_inputs_behind_a_relu():
    x = gaussian(1, 40_000).relu()
    found = relative_power(calibrated(x, signed=False), x)
    assert all(found[a] > 1.5 * found[b] for a, b in pairwise(WIDTHS))
    error = x - torch.where(x > 0.5 * (s := calibrated(x, signed=False).scales[0].detach()), s, 0.0)
    assert found[1] == pytest.approx(12 * float(error.square().mean() / x.square().mean()), rel=1e-3)


def test_no_width_counts_less_than_a_wider_one():
    x, quantizer = gaussian(1000), LSQ((2, 3, 4), signed=True)
    for bits, scale in ((2, 0.5), (3, 2.0), (4, 0.1)):
        quantizer.init(bits, torch.tensor([scale]))
    found, power = relative_power(quantizer, x), float(x.square().mean())
    assert found == pytest.approx({2: 4 / power, 3: 4 / power, 4: 0.01 / power}, rel=1e-5)


@pytest.mark.parametrize("factor", [10.0, 2.0**-100, 2.0**60])
def test_the_unit_of_a_tensor_does_not_matter(factor):
    weight = gaussian(16, 64)
    first, second = (relative_power(calibrated(w), w) for w in (weight, factor * weight))
    assert second == pytest.approx(first, rel=1e-4)


def test_zeros_have_nothing_to_lose():
    assert relative_power(calibrated(torch.zeros(4, 4)), torch.zeros(4, 4)) == dict.fromkeys(WIDTHS, LEAST)


def test_it_is_read_after_training_and_needs_no_alpha(net, train):
    mpq = HubMPQ.from_module(net, X)
    found = mpq.train_indicators(train, steps=2, indicator="scale", candidates=Candidates.of((1, 2, 4)))
    assert (found.unit, found.provenance["indicator"], mpq.score_table()[1]) == ("relative_power", "scale", 1.0)
    assert not found.predicts
    for row in (*found.weight.values(), *found.activation.values()):
        assert row[1] > row[2] > row[4]
    still = mpq.train_indicators(train, steps=0, indicator="scale", candidates=Candidates.of((1, 2, 4)))
    assert still.weight["3"] != found.weight["3"]
    weight = net[3].weight.detach()
    scales = weight_grid(weight.flatten(1), 4)[0]
    assert still.weight["3"][4] == pytest.approx(float(scales.square().mean() / weight.square().mean()), rel=1e-5)


def test_the_authors_preset_keeps_the_raw_scale(net, train):
    mpq = HubMPQ.from_module(net, X)
    found = mpq.train_indicators(train, steps=0, preset="authors")
    assert (found.unit, found.provenance["indicator"]) == ("scale", "raw scale")
    for name in ("3", "6", "9"):
        for bits, scale in found.weight[name].items():
            weight = net.get_submodule(name).weight
            assert scale == pytest.approx(float(weight_scale_sigma(weight, bits)), rel=1e-6)
    sums = [sum(v for row in rows.values() for v in row.values()) for rows in (found.activation, found.weight)]
    assert mpq.score_table()[1] == pytest.approx(sums[0] / sums[1])


def test_a_layer_that_no_batch_reaches(train):
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.used, self.idle = nn.Linear(64, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            x = self.used(self.stem(x.flatten(1)).relu())
            return self.head(self.idle(x) if len(x) == 1 else x)

    found = HubMPQ.from_module(Idle(), X).train_indicators(train, steps=0, indicator="scale")
    assert set(found.activation["idle"].values()) == {LEAST}
