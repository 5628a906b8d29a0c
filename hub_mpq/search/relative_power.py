"""The learned scale without its unit: the power of the quantization error relative to that of the tensor."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from ..quantizers import LSQ

LEAST = 1e-30


@torch.no_grad()
def relative_power(quantizer: LSQ, x: Tensor) -> dict[int, float]:
    """{bits: (s/rms)²} of a tensor at every width of its quantizer, widths ascending [our construction].

    A uniform quantizer's error has the power s²/12, so (s/rms)² is twelve times the noise-to-signal ratio of the
    tensor. It has no unit, and a power is what adds up over layers. Scales per channel count by the mean of their
    squares.

    Two levels are no uniform grid: {−s, +s} has a smaller s than 2 bits have, {0, s} a larger one than its error
    tells. At 1 bit the error is therefore measured, in the same unit: 12 · mean((Q(x) − x)²) / rms².

    A wider width never counts more than a narrower one (the largest value from the widest down). A tensor of zeros
    has the least value that can be stored. The quantizer is off afterwards.
    """
    # in units of the largest value, so that squares of tiny ones are not lost
    largest = float(x.abs().max()) if x.numel() else 0.0
    if largest == 0:
        return dict.fromkeys(quantizer.widths, LEAST)
    power = float((x / largest).double().square().mean())
    rows = (quantizer.scales / largest).double().square().mean(1).tolist()
    found = dict(zip(quantizer.widths, rows, strict=True))
    if 1 in found:
        quantizer.set_width(1)
        found[1] = 12 * float(((quantizer(x) - x) / largest).double().square().mean())
    quantizer.set_width(None)
    widest_first = sorted(found, reverse=True)
    values = accumulate((max(found[bits] / power, LEAST) for bits in widest_first), max)
    return dict(sorted(zip(widest_first, values, strict=True)))
