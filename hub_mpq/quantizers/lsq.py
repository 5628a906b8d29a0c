"""LSQ: a learned scale, one per candidate bit-width in one vector, as in the paper (LIMPQ, §3.2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..core import QuantSpec
from ..errors import InvalidArgument
from .base import LastRead, Quantizer, channel_rows, keep_dtype
from .compiled import compiler_works
from .fake_quantize import quantize, quantize_traced, straight
from .fake_quantize_kernels import Grid, to_int, wide

NO_START = 2.0**-100
"""Initial scale of weights that are all zero, see `LSQ`."""
HEADROOM = 1.1
FLOOR = 2.0**-20


def _numbers(tensor: Tensor) -> list[int]:
    out: list[int] = tensor.tolist()
    return out


def _without_start(base: Tensor) -> list[Tensor] | None:
    """The channels without an initial scale, per bit-width; None if all have one."""
    if float(base.min()) > NO_START:  # a single read at every step
        return None
    found = base == NO_START
    return [row.nonzero().view(-1) for row in found] if bool(found.any()) else None


class LSQ(Quantizer):
    """Learned step size quantization at any of several bit-widths.

    The buffer `base` holds the initial scales, and the parameter `shift` the learned change. Both have the shape
    `[len(widths), channels]` and stay float32 when the model is cast.

    A weight, or a channel of one, that is all zero has no initial scale. Its base is 2^−100, and its scale follows the
    current weight as `1.1·max|w|/qmax`, so that training can leave zero in steps of any size; the factor 1.1 keeps the
    largest element inside the range, where it has a gradient (our construction).

    Args:
        widths: Candidate bit-widths, ascending; `set_width` selects one.
        signed: True for weights: symmetric codes −2^(b−1) … 2^(b−1)−1, or {−1, +1} at 1 bit. False for activations:
            codes 0 … 2^b−1 with a fixed integer zero point, which is 0 after a ReLU and else chosen from data.
        channels: Number of scales per bit-width; 1 for one per tensor.
        axis: The channel axis of a weight. A negative one counts from the end, and all axes before the last two then
            count as channels too (for a stack of matrices).
        log: True for scale = base · exp(shift) (our construction; scale-free, so that one learning rate fits all
            layers), False for base + shift, as in the paper.

    Attributes:
        compiled: Whether large tensors use the compiled passes, see `compile_quantizers`.

    References:
        LSQ (Esser et al., ICLR 2020). One scale per bit-width: LIMPQ (Tang et al., ECCV 2022), §3.2.

    Example:
        >>> import torch
        >>> from hub_mpq.quantizers import LSQ
        >>> quantizer = LSQ([2, 4], signed=True)
        >>> quantizer.init(2, torch.tensor([0.5]))
        >>> quantizer.set_width(2)
        >>> quantizer(torch.tensor([-3.0, 0.1, 0.4]))
        tensor([-1.0000,  0.0000,  0.5000], grad_fn=...)
    """

    base: Tensor
    zero_points: Tensor
    compiled: bool = False

    def __init__(
        self, widths: Sequence[int], *, signed: bool, channels: int = 1, axis: int = 0, log: bool = True
    ) -> None:
        super().__init__()
        self.widths, self.signed, self.axis, self.log = tuple(widths), signed, axis, log
        self.shift = nn.Parameter(torch.zeros(len(self.widths), channels, dtype=torch.float32))
        self.register_buffer("base", torch.ones(len(self.widths), channels, dtype=torch.float32))
        self.register_buffer("zero_points", torch.zeros(len(self.widths), dtype=torch.int32))
        self._zeros, self._without_start = LastRead(_numbers), LastRead(_without_start)
        self._specs = [QuantSpec(b, signed, signed, "channel" if channels > 1 else "tensor", axis) for b in self.widths]
        self._index: int | None = 0
        self._narrow: int | None = None

    def set_width(self, bits: int | None) -> None:
        """Select a bit-width.

        Args:
            bits: One of `widths`; None passes the input through unchanged.

        Raises:
            InvalidArgument: The quantizer does not have this bit-width.
        """
        if bits is not None and bits not in self.widths:
            raise InvalidArgument(f"this quantizer does not have {bits} bits; choose from {self.widths}")
        self._index = None if bits is None else self.widths.index(bits)

    def narrow(self, bits: int | None) -> None:
        """Temporarily use fewer bits over the range of the selected bit-width.

        Args:
            bits: The bit-width, 2 or more; None returns to the selected one.
        """
        self._narrow = bits

    def nearest(self, bits: int) -> int:
        """Return the closest candidate bit-width.

        Args:
            bits: A bit-width.

        Returns:
            One of `widths`, the wider of two equally close ones.
        """
        return min(self.widths, key=lambda b: (abs(b - bits), -b))

    @property
    def spec(self) -> QuantSpec | None:
        return None if self._index is None else self._specs[self._index]

    @property
    def scales(self) -> Tensor:
        """All scales, `[len(widths), channels]`."""
        return self._scales(slice(None))

    def _scales(self, rows: int | slice) -> Tensor:
        return self._scale_of(self.base[rows], self.shift[rows])

    def _scale_of(self, base: Tensor, shift: Tensor) -> Tensor:
        # the floor only guards against linear steps past zero; there is no upper bound
        return base * shift.exp() if self.log else torch.maximum(base + shift, base * FLOOR)

    @property
    def scale(self) -> Tensor:
        return self._scales(self._index or 0)

    @property
    def zero_point(self) -> int:
        return 0 if self.signed else self._zeros(self.zero_points)[self._index or 0]

    @torch.no_grad()
    def init(self, bits: int, scale: Tensor, zero_point: int = 0) -> None:
        """Initialize the scale and zero point of one bit-width.

        Args:
            bits: The bit-width, one of `widths`.
            scale: Positive scales, `[channels]` or `[1]`.
            zero_point: The zero point, for activations.
        """
        row = self.widths.index(bits)
        self.base[row] = scale.to(self.base).clamp_min(torch.finfo(torch.float32).tiny)
        self.shift[row] = 0
        self.zero_points[row] = zero_point

    def operand(self, x: Tensor, matrix: int | None = None) -> tuple[Tensor, Grid] | None:
        """Return the current scale and grid for a tensor.

        Args:
            x: The tensor.
            matrix: Index of one matrix if `x` is a stack of matrices; the scale is then that of `x[matrix]`.

        Returns:
            (scale shaped to broadcast against `x`, grid); None if the input passes through unchanged.
        """
        return None if self._index is None else self._grid(x, matrix)

    @torch.no_grad()
    def _follow(self, weight: Tensor, channels: Tensor) -> None:
        """Set the current scales of channels without an initial scale."""
        rows = channel_rows(weight, self.axis)[channels] if self.base.shape[1] > 1 else weight.reshape(1, -1)
        row = self._index or 0
        self.shift[row, channels] = self._shift_to(rows, self.base[row, channels])

    def _shift_to(self, rows: Tensor, base: Tensor) -> Tensor:
        """The `shift` of a scale that follows the weight; `rows`: [channels of `base`, values]."""
        top = wide(rows).abs().amax(1)
        qmax = self._specs[self._index or 0].qmax
        scale = torch.where(top > 0, top.to(base) * (HEADROOM / max(qmax, 1)), base)
        return scale.log() - base.log() if self.log else scale - base

    def _grid(self, x: Tensor, matrix: int | None = None) -> tuple[Tensor, Grid]:
        spec = self._specs[self._index or 0]
        if self.signed:
            channels = self._without_start(self.base)
            if channels is not None and len(channels[self._index or 0]):
                self._follow(x, channels[self._index or 0])
        scale, z = self.scale, self.zero_point
        if self._narrow is not None and 2 <= self._narrow < spec.num_bits:
            full, spec = spec, replace(spec, num_bits=self._narrow)
            scale, z = scale * (full.qmax / spec.qmax), round(z * spec.qmax / full.qmax)
        low, high = spec.qmin - z, spec.qmax - z
        factor = 1 / math.sqrt(self._served(x, scale) * max(abs(low), high))
        if matrix is not None:
            each = scale.numel() // len(x)
            x, scale = x[matrix], scale if self.base.shape[1] == 1 else scale[matrix * each : (matrix + 1) * each]
        return self._spread(x, scale), Grid(low, high, spec.binary, factor, self.compiled)

    def _spread(self, x: Tensor, scale: Tensor) -> Tensor:
        """A scale shaped to broadcast against `x`."""
        if self.base.shape[1] == 1:
            return scale
        axis, front = self.axis % x.dim(), x.dim() - 2 if self.axis < 0 else 0
        return scale.view([size if d == axis or d < front else 1 for d, size in enumerate(x.shape)])

    def _served(self, x: Tensor, scale: Tensor) -> int:
        """The number of elements per scale; for activations that of one sample, so that the gradient does not depend on
        how a batch is distributed over processes."""
        return max(x.numel() // scale.numel() if self.signed else math.prod(x.shape[1:]), 1)

    def _traced(self, x: Tensor) -> Tensor:
        """`forward` for compilers, which cannot read the zero points or which channels have an initial scale."""
        row = self._index or 0
        full = spec = self._specs[row]
        base, shift = self.base[row], self.shift[row]
        if self.signed:
            rows = channel_rows(x.detach(), self.axis) if len(base) > 1 else x.detach().reshape(1, -1)
            shift = torch.where(base == NO_START, straight(shift, self._shift_to(rows, base)), shift)
        scale, z = self._scale_of(base, shift), self.zero_points[row]
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

    def of_matrix(self, stack: Tensor, index: int) -> Tensor:
        if torch.compiler.is_compiling():
            return super().of_matrix(stack, index)
        operand = self.operand(stack, index)
        return stack[index] if operand is None else quantize(stack[index], *operand)

    @torch.no_grad()
    def to_int(self, x: Tensor) -> Tensor:
        scale, grid = self._grid(x)
        return to_int(wide(x), scale, grid.low, grid.high, binary=grid.binary).to(torch.int16)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LSQ:
        """Keep the scales float32 in casts such as `.to(torch.bfloat16)`, which would otherwise change the grid."""
        super()._apply(keep_dtype(fn, (self.base, self.shift, self.shift.grad)), recurse)
        return self

    def extra_repr(self) -> str:
        """Describe the quantizer for `repr`.

        Returns:
            The description.
        """
        return f"widths={self.widths}, signed={self.signed}, channels={self.base.shape[1]}"


def compile_quantizers(model: nn.Module) -> bool:
    """Use torch.compile for the large tensors of a model's LSQ quantizers, in this process.

    Args:
        model: The model.

    Returns:
        True on success; False, with the model unchanged, if kernels cannot be built (on a CPU without a C++ compiler).

    Example:
        >>> import torch
        >>> from hub_mpq.quantizers import compile_quantizers
        >>> compile_quantizers(torch.nn.ReLU())  # it has no quantizers
        True
    """
    quantizers = [m for m in model.modules() if isinstance(m, LSQ)]
    if not all(compiler_works(kind) for kind in {q.base.device.type for q in quantizers}):
        return False
    for q in quantizers:
        q.compiled = True
    return True
