"""LSQ: the scale is learned. One scale per candidate width, in one vector (LIMPQ §3.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..core import QuantSpec
from ..errors import InvalidArgument
from .base import Quantizer
from .compiled import compiler_works
from .fake_quantize import quantize, quantize_traced
from .fake_quantize_kernels import Grid, to_int, wide


class LSQ(Quantizer):
    """Learned step size quantization (Esser et al., ICLR 2020) at any of several widths.

    widths: the candidate widths, ascending; `set_width` selects one, None lets the input through.
    signed: weights: symmetric codes −2^(b−1) … 2^(b−1)−1 (1 bit: {−1, +1}). Unsigned: activations, codes
        0 … 2^b−1 with an integer zero point: 0 behind a ReLU, else chosen from data and then kept.
    channels, axis: one scale per index of `axis` (weights); channels = 1 is per tensor.
    log: scale = base · exp(shift), the learned `shift` starting at zero [our construction: scale-free, so that one
        learning rate fits every layer]; False: base + shift, the paper's own parameter.

    compiled: large tensors go through the compiled passes; `compile_quantizers` sets it.

    `base` is the start (a buffer), `shift` how far training went from it. Shapes [len(widths), channels].
    """

    base: Tensor
    zero_points: Tensor
    compiled: bool = False

    def __init__(
        self, widths: Sequence[int], *, signed: bool, channels: int = 1, axis: int = 0, log: bool = True
    ) -> None:
        super().__init__()
        self.widths, self.signed, self.axis, self.log = tuple(widths), signed, axis, log
        self.shift = nn.Parameter(torch.zeros(len(self.widths), channels))
        self.register_buffer("base", torch.ones(len(self.widths), channels))
        self.register_buffer("zero_points", torch.zeros(len(self.widths), dtype=torch.int32))
        self._zero_cache: tuple[int, list[int]] = (-1, [])
        self._specs = [QuantSpec(b, signed, signed, "channel" if channels > 1 else "tensor", axis) for b in self.widths]
        self._index: int | None = 0
        self._narrow: int | None = None

    def set_width(self, bits: int | None) -> None:
        """Select a width; None passes the input through. Raises InvalidArgument for a width it does not have."""
        if bits is not None and bits not in self.widths:
            raise InvalidArgument(f"{bits} bits is none of this quantizer's widths {self.widths}")
        self._index = None if bits is None else self.widths.index(bits)

    def narrow(self, bits: int | None) -> None:
        """For now use `bits` (2 or more) instead of the selected width, over the same range; None ends that."""
        self._narrow = bits

    def nearest(self, bits: int) -> int:
        """The candidate width nearest to `bits`, the wider one of two equally near."""
        return min(self.widths, key=lambda b: (abs(b - bits), -b))

    @property
    def spec(self) -> QuantSpec | None:
        return None if self._index is None else self._specs[self._index]

    @property
    def scales(self) -> Tensor:
        """All scales, [len(widths), channels]."""
        return self._scales(slice(None))

    def _scales(self, rows: int | slice) -> Tensor:
        base, shift = self.base[rows], self.shift[rows]
        # the floor only guards linear steps past zero; nothing is capped from above
        return base * shift.exp() if self.log else (base + shift).clamp_min(1e-8)

    @property
    def scale(self) -> Tensor:
        return self._scales(self._index or 0)

    @property
    def zero_point(self) -> int:
        if self.zero_points.is_inference():  # made in inference_mode: it has no version
            return int(self.zero_points[self._index or 0])
        version = self.zero_points._version
        if self._zero_cache[0] != version:  # reading a tensor would wait for a GPU at every step
            self._zero_cache = (version, self.zero_points.tolist())
        return self._zero_cache[1][self._index or 0]

    @torch.no_grad()
    def init(self, bits: int, scale: Tensor, zero_point: int = 0) -> None:
        """Set the start of one width; `scale` [channels] or [1], above zero."""
        row = self.widths.index(bits)
        self.base[row] = scale.to(self.base).clamp_min(1e-8)
        self.shift[row] = 0
        self.zero_points[row] = zero_point

    def operand(self, x: Tensor) -> tuple[Tensor, Grid] | None:
        """(scale shaped to broadcast against `x`, the grid in force); None when `x` passes through."""
        return None if self._index is None else self._grid(x)

    def _grid(self, x: Tensor) -> tuple[Tensor, Grid]:
        spec = self._specs[self._index or 0]
        scale, z = self.scale, self.zero_point
        if self._narrow is not None and 2 <= self._narrow < spec.num_bits:
            full, spec = spec, replace(spec, num_bits=self._narrow)
            scale, z = scale * (full.qmax / spec.qmax), round(z * spec.qmax / full.qmax)
        low, high = spec.qmin - z, spec.qmax - z
        factor = 1 / math.sqrt(self._served(x, scale) * max(abs(low), high))
        return self._spread(x, scale), Grid(low, high, spec.binary, factor, self.compiled)

    def _spread(self, x: Tensor, scale: Tensor) -> Tensor:
        """A scale shaped to broadcast against `x`."""
        if self.base.shape[1] == 1:
            return scale
        return scale.view([-1 if d == self.axis % x.dim() else 1 for d in range(x.dim())])

    def _served(self, x: Tensor, scale: Tensor) -> int:
        """How many elements one scale serves: per sample for an activation, so that the gradient does not depend on how
        a batch is spread over processes."""
        return max(x.numel() // (scale.numel() if self.signed else max(len(x), 1)), 1)

    def _traced(self, x: Tensor) -> Tensor:
        """`forward` for a compiler, which cannot look at the zero points."""
        row = self._index or 0
        full = spec = self._specs[row]
        scale, z = self.scale, self.zero_points[row]
        if self._narrow is not None and 2 <= self._narrow < full.num_bits:
            spec = replace(full, num_bits=self._narrow)
            scale, z = scale * (full.qmax / spec.qmax), (z * spec.qmax / full.qmax).round()
        low, high = spec.qmin - z, spec.qmax - z
        factor = (self._served(x, scale) * torch.maximum(low.abs(), high)).rsqrt()
        return quantize_traced(x, self._spread(x, scale), low, high, binary=spec.binary, factor=factor)

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and self._index is not None:
            return self._traced(x)
        operand = self.operand(x)
        return x if operand is None else quantize(x, *operand)

    @torch.no_grad()
    def to_int(self, x: Tensor) -> Tensor:
        scale, grid = self._grid(x)
        return to_int(wide(x), scale, grid.low, grid.high, binary=grid.binary).to(torch.int16)

    def extra_repr(self) -> str:
        return f"widths={self.widths}, signed={self.signed}, channels={self.base.shape[1]}"


def compile_quantizers(model: nn.Module) -> bool:
    """Send the large tensors of a model's LSQ quantizers through torch.compile, for this process.

    False, and nothing is changed, where kernels can't be built (a CPU without a C++ compiler).
    """
    quantizers = [m for m in model.modules() if isinstance(m, LSQ)]
    if not all(compiler_works(kind) for kind in {q.base.device.type for q in quantizers}):
        return False
    for q in quantizers:
        q.compiled = True
    return True
