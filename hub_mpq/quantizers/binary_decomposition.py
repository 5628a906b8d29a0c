"""EBS's binary decomposition: a product of b-bit operands as products of {0, 1} planes, in plain torch.

W·X = Σ_m Σ_k 2^(m+k) · popcount(W_m AND X_k), an exact identity (Li et al., 2020). This is the slow reference that fast
engines are tested against. Integers are those of `to_int`, q − zero_point, so operands may be signed or have a zero
point; the shift that makes their planes non-negative is compensated with row and column sums (our construction).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core import check_width
from ..errors import InvalidArgument


@dataclass(frozen=True)
class Codes:
    """The mapping of integers to codes 0 … 2^bits − 1: integer = factor·code + low.

    `low`: the smallest integer of the grid, qmin − zero_point. `factor`: 2 for a signed 1-bit tensor {−1, +1}, else 1.
    """

    bits: int
    low: int = 0
    factor: int = 1

    def __post_init__(self) -> None:
        check_width(self.bits)

    @classmethod
    def signed(cls, bits: int) -> Codes:
        """Codes of a symmetric signed tensor: −2^(b−1) … 2^(b−1)−1, or {−1, +1} at 1 bit."""
        return cls(1, -1, 2) if bits == 1 else cls(bits, -(2 ** (bits - 1)))

    def encode(self, integers: Tensor) -> Tensor:
        """Codes, int64, of integers of any dtype; InvalidArgument for values that are fractional or not on the grid."""
        whole = integers.long()
        if bool((whole != integers).any()):
            raise InvalidArgument("codes must be made from integers; a value is fractional or not finite")
        shifted = whole - self.low
        code = torch.div(shifted, self.factor, rounding_mode="floor")
        if bool((code * self.factor != shifted).any()) or bool(((code < 0) | (code >= 2**self.bits)).any()):
            raise InvalidArgument(f"an integer is outside the {self.bits}-bit grid that starts at {self.low}")
        return code


def planes(codes: Tensor, bits: int) -> Tensor:
    """{0, 1} planes of codes ≥ 0, int64, [bits, *shape]; plane i has the weight 2^i."""
    return torch.stack([(codes >> i) & 1 for i in range(bits)])


def binary_product(weight: Tensor, x: Tensor) -> Tensor:
    """popcount(W AND X) of {0, 1} matrices: weight [R, K], x [C, K] → [R, C], exact in int64."""
    return weight.long() @ x.long().T


def code_product(weight: Tensor, x: Tensor, weight_bits: int, x_bits: int) -> Tensor:
    """Product of codes ≥ 0 as one binary product of the stacked planes: weight [O, K], x [N, K] → [N, O], int64."""
    rows = planes(weight, weight_bits).flatten(0, 1)
    columns = planes(x, x_bits).flatten(0, 1)
    counts = binary_product(rows, columns).view(weight_bits, len(weight), x_bits, len(x))
    shift = 2 ** (torch.arange(weight_bits)[:, None] + torch.arange(x_bits))
    return torch.einsum("monk,mn->ko", counts, shift.to(counts))


def binary_linear(x: Tensor, weight: Tensor, x_codes: Codes, weight_codes: Codes) -> Tensor:
    """Product of integers x [..., K] and weight [O, K] → int64 [..., O], exactly x @ weight.T."""
    flat, (a, b) = x.reshape(-1, x.shape[-1]), (x_codes, weight_codes)
    u, v = a.encode(flat), b.encode(weight)
    out = a.factor * b.factor * code_product(v, u, b.bits, a.bits)
    out += a.factor * b.low * u.sum(1)[:, None] + a.low * b.factor * v.sum(1) + a.low * b.low * x.shape[-1]
    return out.reshape(*x.shape[:-1], len(weight))


def binary_conv2d(
    x: Tensor,
    weight: Tensor,
    x_codes: Codes,
    weight_codes: Codes,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Tensor:
    """Convolution of integers x [N, C, H, W] and weight [O, C/groups, kh, kw] → int64 [N, O, H', W'], exact.

    Padding adds the integer 0, which the grid of x must then contain. `padding`: pixels on each side. Raises
    InvalidArgument for other shapes (a single image needs its axis N) and for padding given as a string.
    """
    shaped = groups > 0 and x.dim() == weight.dim() == 4
    if not shaped or x.shape[1] != groups * weight.shape[1] or len(weight) % groups:
        raise InvalidArgument(
            f"a convolution with {groups} groups expects x [N, C, H, W] and weight [O, C/groups, kh, kw], "
            f"got {list(x.shape)} and {list(weight.shape)}"
        )
    strides, dilations = _pair("stride", stride), _pair("dilation", dilation)
    kernel, (ph, pw) = weight.shape[2:], _pair("padding", padding)
    # float64 holds these integers exactly, and unfold takes no int64
    padded = F.pad(x.double(), (pw, pw, ph, ph))
    patches = F.unfold(padded, kernel, dilation=dilations, stride=strides)
    batch, _, area = patches.shape
    parts = patches.view(batch, groups, -1, area).permute(1, 0, 3, 2)
    rows = weight.reshape(groups, len(weight) // groups, -1)
    outs = [binary_linear(part, row, x_codes, weight_codes) for part, row in zip(parts, rows, strict=True)]
    out = torch.cat(outs, -1).transpose(1, 2)

    sides = [(padded.shape[2 + i] - dilations[i] * (kernel[i] - 1) - 1) // strides[i] + 1 for i in (0, 1)]
    return out.reshape(batch, len(weight), *sides)


def _pair(name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of an option of the convolution."""
    if isinstance(value, int):
        return value, value
    if not isinstance(value, (tuple, list)) or len(value) != 2 or not all(isinstance(v, int) for v in value):
        raise InvalidArgument(f"{name} must be one or two integers, got {value!r}")
    return value[0], value[1]
