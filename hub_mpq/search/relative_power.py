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
    """Compute (s/rms)² of a tensor at every bit-width of its quantizer, which is our construction.

    The error of a uniform quantizer has the power s²/12, so (s/rms)² is twelve times the noise-to-signal ratio of the
    tensor. It has no unit, it is the same quantity for weights and inputs, and powers are what adds up over layers. For
    scales per channel, the mean of their squares is used.

    Two levels are not a uniform grid: the s of {−s, +s} is near mean|x|, below that of 2 bits, and the s of {0, s}
    exceeds its error. At 1 bit, the error itself is used in the same unit: 12 · mean((Q(x) − x)²) / rms².

    The values do not increase with the bit-width. A tensor of zeros has the smallest value that can be stored.

    Args:
        quantizer: The quantizer with its scales, which is off afterwards.
        x: The weight, or a sample `[1, values]` of the input of a layer.

    Returns:
        `{bits: (s/rms)²}`.
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
    """Compute the mean square in units of `unit`, so that squares of tiny values do not underflow."""
    return float((x.double() / unit).square().mean())


def relative_powers(layers: Mapping[str, Any], inputs: Mapping[str, Tensor]) -> tuple[Rows, Rows]:
    """Compute `relative_power` of the weights and inputs of quantized layers, whose quantizers are off.

    Args:
        layers: `{name: quantized layer}`.
        inputs: `{name: sampled input values, 1-D}`; a layer without them counts as reading zeros.

    Returns:
        (of weights, of inputs), each `{layer: {bits: value}}`.
    """
    weight = {name: relative_power(module.weight_quantizer, module.weight) for name, module in layers.items()}
    activation = {
        name: relative_power(module.input_quantizer, inputs[name][None] if name in inputs else torch.zeros(1, 1))
        for name, module in layers.items()
        if module.input_quantizer is not None
    }
    return weight, activation
