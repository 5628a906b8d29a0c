"""EBS's binary decomposition: a product of b-bit operands as products of {0, 1} planes, in plain torch.

W·X = Σ_m Σ_k 2^(m+k) · popcount(W_m AND X_k), an exact identity (Li et al., 2020). It is the definition that fast
engines are tested against: nothing here is quick. Integers are those of `to_int`: q − zero_point, so operands may be
signed or have a zero point; what shifts them to planes ≥ 0 comes back as row and column sums [ours].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InvalidArgument
from ..spec import check_width


@dataclass(frozen=True)
class Codes:
    """How integers map to codes 0 … 2^bits − 1: integer = factor·code + low.

    low: the least integer of the grid, qmin − zero_point. factor: 2 for a signed 1-bit tensor {−1, +1}, else 1.
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
        """Codes, int64; InvalidArgument for an integer that the grid does not have."""
        shifted = integers.long() - self.low
        code = torch.div(shifted, self.factor, rounding_mode="floor")
        if bool((code * self.factor != shifted).any()) or bool(((code < 0) | (code >= 2**self.bits)).any()):
            raise InvalidArgument(f"an integer lies outside the {self.bits}-bit grid that starts at {self.low}")
        return code


def planes(codes: Tensor, bits: int) -> Tensor:
    """{0, 1} planes of codes ≥ 0, int64, [bits, *shape]; plane i has the weight 2^i."""
    return torch.stack([(codes >> i) & 1 for i in range(bits)])


def binary_product(weight: Tensor, x: Tensor) -> Tensor:
    """popcount(W AND X) of {0, 1} matrices: weight [R, K], x [C, K] → [R, C], exact in int64."""
    return weight.long() @ x.long().T


def code_product(weight: Tensor, x: Tensor, weight_bits: int, x_bits: int) -> Tensor:
    """Product of codes ≥ 0 by ONE binary product of the stacked planes: weight [O, K], x [N, K] → [N, O], int64."""
    rows = planes(weight, weight_bits).flatten(0, 1)
    columns = planes(x, x_bits).flatten(0, 1)
    counts = binary_product(rows, columns).view(weight_bits, len(weight), x_bits, len(x))
    shift = 2 ** (torch.arange(weight_bits)[:, None] + torch.arange(x_bits))
    return torch.einsum("monk,mn->ko", counts, shift.to(counts))


def binary_linear(x: Tensor, weight: Tensor, x_codes: Codes, weight_codes: Codes) -> Tensor:
    """Integers x [..., K] times integers weight [O, K] → int64 [..., O], exactly x @ weight.T."""
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
    """Integers x [N, C, H, W], weight [O, C/groups, kh, kw] → int64 [N, O, H', W'], exactly their convolution.

    Padding adds the integer 0, which the grid of x must then have. `padding`: pixels on each side.
    """
    kernel, (ph, pw) = weight.shape[2:], (padding, padding) if isinstance(padding, int) else padding
    padded = F.pad(x.long(), (pw, pw, ph, ph))
    # float64 holds these integers exactly, and unfold takes no int64
    patches = F.unfold(padded.double(), kernel, dilation=dilation, stride=stride).long()
    batch, _, area = patches.shape
    parts = patches.view(batch, groups, -1, area).permute(1, 0, 3, 2)
    rows = weight.reshape(groups, len(weight) // groups, -1)
    outs = [binary_linear(part, row, x_codes, weight_codes) for part, row in zip(parts, rows, strict=True)]
    out = torch.cat(outs, -1).transpose(1, 2)

    def side(size: int, axis: int) -> int:
        step = stride if isinstance(stride, int) else stride[axis]
        wide = dilation if isinstance(dilation, int) else dilation[axis]
        return (size - wide * (kernel[axis] - 1) - 1) // step + 1

    return out.reshape(batch, len(weight), side(padded.shape[2], 0), side(padded.shape[3], 1))
