"""CPT: precision that goes up and down while training (Fu et al., ICLR 2021), as a schedule of fine-tuning."""

from __future__ import annotations

import math

from torch import nn

from ..errors import InvalidArgument
from ..quantizers import LSQ


def cyclic_bits(step: int, period: float, low: int, high: int) -> int:
    """rint(low + ½(high − low)(1 + cos(π·(t mod T)/T + π))): `low` as a period begins, `high` as it ends."""
    phase = (step % period) / period
    return round(low + 0.5 * (high - low) * (1 + math.cos(math.pi * phase + math.pi)))


def check_cycles(cycles: object) -> int:
    """`cycles` when it is a whole number of at least 1, else InvalidArgument."""
    if isinstance(cycles, bool) or not isinstance(cycles, int) or cycles < 1:
        raise InvalidArgument(f"cycles is a whole number of at least 1, not {cycles!r}")
    return cycles


class CyclicPrecision:
    """Every quantizer of a model at a fixed policy cycles between `low` bits and its own width, `cycles` times.

    Layers of at most `low` bits stay as they are. A narrower grid keeps the range that the learned scale gives the
    policy's width, so one scale is trained at all widths [ours]. low: at least 2.
    """

    def __init__(self, model: nn.Module, low: int, cycles: int = 8) -> None:
        if not isinstance(low, int) or not 2 <= low <= 8:
            raise InvalidArgument(f"cyclic precision starts at 2 to 8 bits, not {low!r}")
        self.low, self.cycles = low, check_cycles(cycles)
        self.quantizers = [m for m in model.modules() if isinstance(m, LSQ)]

    def set(self, step: int, total: int) -> None:
        """The widths of step `step` of `total`; the last step of the last cycle has the policy's own."""
        period = max(total / self.cycles, 1.0)
        for quantizer in self.quantizers:
            bits = quantizer.spec.num_bits if quantizer.spec else 0
            narrow = None
            if bits > self.low and step + 1 < total:
                narrow = cyclic_bits(step, period, self.low, bits)
            quantizer.narrow(narrow if narrow is not None and narrow < bits else None)

    def release(self) -> None:
        """Back to the policy's widths."""
        for quantizer in self.quantizers:
            quantizer.narrow(None)
