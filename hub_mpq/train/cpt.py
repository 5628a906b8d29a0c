"""Cyclic precision training, CPT (Fu et al., ICLR 2021), as a schedule of fine-tuning."""

from __future__ import annotations

import math

from torch import nn

from ..errors import InvalidArgument
from ..quantizers import LSQ


def cyclic_bits(step: int, period: float, low: int, high: int) -> int:
    """Compute rint(low + ½(high − low)(1 + cos(π·(t mod T)/T + π))), which rises from `low` to `high` in a period."""
    phase = (step % period) / period
    return round(low + 0.5 * (high - low) * (1 + math.cos(math.pi * phase + math.pi)))


def check_cycles(cycles: object) -> int:
    """Return `cycles` if it is an integer of at least 1, else raise InvalidArgument."""
    if isinstance(cycles, bool) or not isinstance(cycles, int) or cycles < 1:
        raise InvalidArgument(f"cycles must be an integer of at least 1, got {cycles!r}")
    return cycles


class CyclicPrecision:
    """Cycle the quantizers of a model between a low bit-width and that of the policy.

    Layers of at most `low` bits are unchanged. A narrower grid keeps the range that the learned scale gives at the
    policy's bit-width, so one scale is trained at all bit-widths; this is our construction.

    Args:
        model: The model, quantized at its policy.
        low: The lowest bit-width, 2 to 8.
        cycles: Number of cycles in the training.
    """

    def __init__(self, model: nn.Module, low: int, cycles: int = 8) -> None:
        if not isinstance(low, int) or not 2 <= low <= 8:
            raise InvalidArgument(f"cyclic_bits must be an integer from 2 to 8, got {low!r}")
        self.low, self.cycles = low, check_cycles(cycles)
        self.quantizers = [m for m in model.modules() if isinstance(m, LSQ)]

    def set(self, step: int, total: int) -> None:
        """Set the bit-widths of step `step` of `total`; those of the last step are the policy's."""
        period = max(total / self.cycles, 1.0)
        for quantizer in self.quantizers:
            bits = quantizer.spec.num_bits if quantizer.spec else 0
            narrow = None
            if bits > self.low and step + 1 < total:
                narrow = cyclic_bits(step, period, self.low, bits)
            quantizer.narrow(narrow if narrow is not None and narrow < bits else None)

    def release(self) -> None:
        """Restore the policy's bit-widths."""
        for quantizer in self.quantizers:
            quantizer.narrow(None)
