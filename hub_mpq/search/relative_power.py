"""The learned scale without its unit: the power of the quantization error relative to that of the tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..quantizers import LSQ
from .sensitivity import LEAST, Rows, at, monotone


@torch.no_grad()
def relative_power(quantizer: LSQ, x: Tensor) -> dict[int, float]:
    """{bits: (s/rms)²} of a tensor at every width of its quantizer [our construction].

    The error of a uniform quantizer has the power s²/12, so (s/rms)² is twelve times the tensor's noise-to-signal
    ratio: it has no unit, it is the same quantity for weights and inputs, and powers are what adds up over layers.
    Scales per channel count by the mean of their squares.

    Two levels are no uniform grid: the s of {−s, +s} is near mean|x|, below that of 2 bits, and the s of {0, s} says
    more than its error does. At 1 bit the error itself is taken, in the same unit: 12 · mean((Q(x) − x)²) / rms².

    No width counts less than a wider one. A tensor of zeros has the least value that can be stored.

    Args:
        quantizer: Its widths and scales; off afterwards.
        x: The weight, or a sample [1, values] of what a layer reads.
    """
    largest = float(x.abs().max()) if x.numel() else 0.0
    if largest == 0:
        return dict.fromkeys(quantizer.widths, LEAST)
    power = _power(x, largest)
    found = {b: _power(row, largest) / power for b, row in zip(quantizer.widths, quantizer.scales, strict=True)}
    if 1 in found:
        with at(quantizer, 1):
            found[1] = 12 * _power(quantizer(x) - x, largest) / power
    return monotone(found)


def _power(x: Tensor, unit: float) -> float:
    """Mean square in units of `unit`, so that the squares of tiny values are not lost."""
    return float((x.double() / unit).square().mean())


def relative_powers(layers: Mapping[str, Any], inputs: Mapping[str, Tensor]) -> tuple[Rows, Rows]:
    """(of weights, of inputs): {layer: `relative_power`} of quantized layers whose quantizers are off.

    Args:
        layers: {name: quantized layer}.
        inputs: {name: values that the layer reads, 1-D}; one that was not reached counts as zeros.
    """
    weight = {name: relative_power(module.weight_quantizer, module.weight) for name, module in layers.items()}
    activation = {
        name: relative_power(module.input_quantizer, inputs[name][None] if name in inputs else torch.zeros(1, 1))
        for name, module in layers.items()
        if module.input_quantizer is not None
    }
    return weight, activation
