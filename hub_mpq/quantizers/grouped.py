"""LSQ with one scale per group of weights in a row, and zero points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..core import QuantSpec
from .fake_quantize import quantize_traced, straight
from .fake_quantize_kernels import to_int, wide
from .lsq import LSQ

MARGIN = 16.0
"""Factor by which training may change a scale before it leaves float16's range."""


def group_dtype(scale: Tensor) -> torch.dtype:
    """The dtype in which group scales are stored: float16 if all are in its normal range, else bfloat16."""
    info = torch.finfo(torch.float16)
    least, most = (float(x) for x in torch.aminmax(scale.float()))
    return torch.float16 if least >= info.tiny and most <= info.max else torch.bfloat16


def spread(values: Tensor, group_size: int | None, columns: int) -> Tensor:
    """Expand [rows, groups] to [rows, columns]: the value of each weight's group."""
    if group_size is None:
        return values.expand(-1, columns) if values.dim() == 2 else values[:, None].expand(-1, columns)
    return values.repeat_interleave(group_size, 1)[:, :columns]


class GroupedLSQ(LSQ):
    """Learned step sizes for groups of weights, with fixed zero points. Our construction.

    Group scales are rounded to their 16-bit storage type before they are used, so that packed and quantized weights are
    bit-identical; the gradient passes through.

    Args:
        widths: Candidate bit-widths, ascending.
        shape: (rows, columns) of the weight, where a row holds the weights of one output channel; for a stack of
            matrices, the rows of all of them.
        group_size: Number of weights in a row that share a scale; None for one scale per row.
        symmetric: False for a zero point beside each scale.
        transposed: Whether the weight is [columns, rows], or a stack of such matrices.
        log: Parametrization of the scale, see `LSQ`.

    Example:
        >>> import torch
        >>> from hub_mpq.quantizers import GroupedLSQ
        >>> quantizer = GroupedLSQ([4], (1, 4), group_size=2, symmetric=True)
        >>> quantizer.init(4, torch.tensor([[1.0, 0.5]]))
        >>> quantizer.to_int(torch.tensor([[1.2, 2.0, 1.2, 2.0]]))
        tensor([[1, 2, 2, 4]], dtype=torch.int16)
    """

    def __init__(
        self,
        widths: Sequence[int],
        shape: tuple[int, int],
        *,
        group_size: int | None,
        symmetric: bool,
        transposed: bool = False,
        log: bool = True,
    ) -> None:
        self.rows, self.columns = shape
        self.groups = 1 if group_size is None else -(-self.columns // group_size)
        super().__init__(widths, signed=True, channels=self.rows * self.groups, axis=int(transposed), log=log)
        self.group_size, self.symmetric, self.transposed = group_size, symmetric, transposed
        self.scale_dtype = torch.float32 if group_size is None else torch.float16
        self.zero_points = torch.zeros(self.base.shape, dtype=torch.int32)
        granularity = "channel" if group_size is None else "group"
        self._specs = [QuantSpec(b, True, symmetric or b == 1, granularity, self.axis, group_size) for b in self.widths]

    @torch.no_grad()
    def init(self, bits: int, scale: Tensor, zero_point: Tensor | int | None = None) -> None:
        """Initialize the scales and zero points of one bit-width.

        Args:
            bits: The bit-width, one of `widths`.
            scale: Positive scales, `[rows, groups]` or `[rows]`. A dtype of float16 or bfloat16 is kept as the storage
                type; otherwise one is chosen.
            zero_point: Integers of the same shape; None or 0 for none.
        """
        row = self.widths.index(bits)
        if self.group_size is not None:
            stored = (torch.float16, torch.bfloat16)
            self.scale_dtype = scale.dtype if scale.dtype in stored else group_dtype(torch.cat([scale, scale / MARGIN]))
        super().init(bits, scale.reshape(-1))
        zero = torch.zeros(()) if zero_point is None else torch.as_tensor(zero_point)
        self.zero_points[row] = zero.to(self.zero_points).reshape(-1).expand(self.base.shape[1])

    @property
    def zero_point(self) -> int:
        """Always 0; the zero points of groups are returned by `group_zero_points`."""
        return 0

    def group_zero_points(self) -> Tensor | None:
        """Return the current zero points.

        Returns:
            int32 `[rows, groups]`; None if there are none.
        """
        if self.spec is None or self.spec.symmetric:
            return None
        return self.zero_points[self._index or 0].view(self.rows, self.groups)

    def group_scale(self) -> Tensor:
        """Return the current scales.

        Returns:
            `[rows, groups]` in the dtype in which they are stored.
        """
        return self.scale.detach().view(self.rows, self.groups).to(self.scale_dtype)

    def _rows(self, x: Tensor) -> Tensor:
        """The weight as [rows, columns]."""
        return (x.transpose(-2, -1) if self.transposed else x).reshape(-1, self.columns)

    def _like(self, x: Tensor, rows: Tensor) -> Tensor:
        """The inverse of `_rows`, with the shape of `x`; contiguous, like an unpacked weight."""
        return rows.reshape(x.mT.shape).mT.contiguous() if self.transposed else rows.reshape(x.shape)

    def _grid_of(self, part: slice = slice(None)) -> tuple[Tensor, Tensor, Tensor, bool, float]:
        """(scale, lowest and highest integer, each per weight of the rows; whether it is 1 bit; LSQ's factor)."""
        spec = full = self._specs[self._index or 0]
        scale = self.scale.view(self.rows, self.groups)[part]
        zero = self.zero_points[self._index or 0].view(self.rows, self.groups)[part]
        if self._narrow is not None and 2 <= self._narrow < spec.num_bits:
            spec = replace(full, num_bits=self._narrow)
            scale, zero = scale * (full.qmax / spec.qmax), (zero * (spec.qmax / full.qmax)).round().to(zero.dtype)
        if self.group_size is not None:
            scale = straight(scale, scale.to(self.scale_dtype).to(scale.dtype))
        low, high = (spread(end - zero, self.group_size, self.columns) for end in (spec.qmin, spec.qmax))
        factor = (self.columns / self.groups * max(-spec.qmin, spec.qmax)) ** -0.5
        return spread(scale, self.group_size, self.columns), low, high, spec.binary, factor

    def forward(self, x: Tensor) -> Tensor:
        return self._quantized(x, slice(None))

    def of_matrix(self, stack: Tensor, index: int) -> Tensor:
        each = self.rows // len(stack)
        return self._quantized(stack[index], slice(index * each, (index + 1) * each))

    def _quantized(self, x: Tensor, part: slice) -> Tensor:
        """`x`, the given rows, rounded to the grid."""
        if self._index is None:
            return x
        scale, low, high, binary, factor = self._grid_of(part)
        return self._like(x, quantize_traced(self._rows(x), scale, low, high, binary=binary, factor=factor))

    @torch.no_grad()
    def to_int(self, x: Tensor) -> Tensor:
        """Compute the integers minus their zero points.

        Args:
            x: The weight.

        Returns:
            int16 with the shape of `x`.
        """
        scale, low, high, binary, _ = self._grid_of()
        return self._like(x, to_int(wide(self._rows(x)), scale, low, high, binary=binary).to(torch.int16))

    @torch.no_grad()
    def stored(self, x: Tensor) -> Tensor:
        """Compute the integers as they are stored: `to_int` plus the zero points.

        Args:
            x: The weight.

        Returns:
            int16 with the shape of `x`.
        """
        zero = self.group_zero_points()
        if zero is None:
            return self.to_int(x)
        shift = spread(zero, self.group_size, self.columns).to(torch.int16)
        return self.to_int(x) + self._like(x, shift)

    def extra_repr(self) -> str:
        """Describe the quantizer for `repr`.

        Returns:
            The description.
        """
        return f"widths={self.widths}, group_size={self.group_size}, symmetric={self.symmetric}"
