"""Gradient quantizers of fully quantized training: per tensor, per sample and block Householder.

They are unbiased, by stochastic rounding (Chen et al., "A Statistical Framework for Low-bitwidth Training of Deep
Neural Networks", NeurIPS 2020).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core import check_width
from ..errors import InvalidArgument
from ..nn.quantize import quantized_layers

KINDS = ("tensor", "sample", "householder")
TINY = 1e-20


def stochastic_round(x: Tensor, generator: torch.Generator) -> Tensor:
    """Compute floor(x + u) with u uniform in [0, 1); the expectation is x."""
    return (x + torch.rand(x.shape, generator=generator).to(x)).floor()


def quantize_tensor(rows: Tensor, bits: int, generator: torch.Generator) -> Tensor:
    """Quantize rows `[N, D]` with one scale, (2^b − 1)/range."""
    low, high = rows.min(), rows.max()
    scale = (2**bits - 1) / (high - low).clamp_min(TINY)
    return stochastic_round((rows - low) * scale, generator) / scale + low


def quantize_sample(rows: Tensor, bits: int, generator: torch.Generator) -> Tensor:
    """Quantize rows `[N, D]` with one scale for each row."""
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    scale = (2**bits - 1) / (high - low).clamp_min(TINY)
    return stochastic_round((rows - low) * scale, generator) / scale + low


def _reflect(x: Tensor) -> Tensor:
    """Reflect axis 1 of `[G, k, D]` so that e_1 becomes the constant 1/√k (Householder); its own inverse."""
    k = x.shape[1]
    if k == 1:
        return x
    n = torch.full((k,), k**-0.5, dtype=x.dtype, device=x.device)
    n[0] -= 1
    n = n / n.norm()
    return x - 2 * n[None, :, None] * (n[None, None] @ x)


def _blocks(rows: Tensor, order: Tensor, groups: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return rotated and scaled blocks `[G, k, D]`, their scales `[G, k, 1]` and offsets `[G]` for G groups."""
    size = -(-len(rows) // groups)
    padded = torch.cat([rows[order], rows.new_zeros(size * groups - len(rows), rows.shape[1])])
    # the G largest rows lead one group each; the others are dealt out in turn
    x = padded.view(size, groups, -1).transpose(0, 1)
    span = (x.amax(2) - x.amin(2)).clamp_min(TINY)
    lead, rest = span[:, :1], span[:, 1:].amax(1, keepdim=True) if size > 1 else span[:, :1]
    # minimizes Σ s^-2 subject to λ1·s1/√k + λ2·s2 = B
    first, others = lead ** (-1 / 3) * size ** (1 / 6), rest ** (-1 / 3) * max(size - 1, 1) ** (1 / 3)
    scale = torch.cat([first, others.expand(-1, size - 1)], 1)[..., None]
    turned = _reflect(x * scale)
    low, high = turned.amin((1, 2), keepdim=True), turned.amax((1, 2), keepdim=True)
    factor = (2**bits - 1) / (high - low).clamp_min(TINY)
    return turned * factor, scale * factor, low * factor


def quantize_householder(rows: Tensor, bits: int, generator: torch.Generator) -> Tensor:
    """Quantize rows `[N, D]` by block Householder: a large row shares its range with many small ones.

    Rows are centred, then each group is scaled, reflected, rounded and transformed back. The number of groups, out of
    1, 2, 4, … N, minimizes the variance bound Σ s^-2. N groups are the per-sample quantizer, so the bound never exceeds
    that one's. The scales follow from the paper's bound; groups of equal size and the search over their number are our
    construction.
    """
    middle = (rows.amin(1, keepdim=True) + rows.amax(1, keepdim=True)) / 2
    centred = rows - middle
    order = (rows.amax(1) - rows.amin(1)).argsort(descending=True, stable=True)
    counts = sorted({len(rows), *(2**i for i in range(len(rows).bit_length()) if 2**i <= len(rows))}, reverse=True)
    best, chosen = float("inf"), None
    for groups in counts:
        found = _blocks(centred, order, groups, bits)
        mine = found[1].transpose(0, 1).reshape(-1)[: len(rows)]
        bound = float(mine.double().pow(-2).sum())
        if bound < best:
            best, chosen = bound, found
    if chosen is None:  # gradients that are not finite: the training loop reports them
        return rows
    turned, scale, low = chosen
    codes = stochastic_round(turned - low, generator) + low
    back = (_reflect(codes) / scale).transpose(0, 1).reshape(-1, rows.shape[1])[: len(rows)]
    out = torch.empty_like(rows)
    out[order] = back
    return out + middle


def quantize_gradient(grad: Tensor, bits: int, kind: str, generator: torch.Generator, samples: bool = False) -> Tensor:
    """Quantize a gradient to b-bit grids, without bias.

    Args:
        grad: The gradient. The rows that are quantized are its samples if it has the shape `[N, C, H, W]` or if
            `samples` is set, else the vectors of all tokens, of shape `[..., features]`.
        bits: Bit-width of the grids.
        kind: "tensor", "sample" or "householder".
        generator: Random number generator of the rounding.
        samples: Whether the first axis is that of the samples, as for convolutions.
    """
    rows = (grad.flatten(1) if samples or grad.dim() == 4 else grad.reshape(-1, grad.shape[-1])).float()
    function = {"tensor": quantize_tensor, "sample": quantize_sample, "householder": quantize_householder}[kind]
    return function(rows, bits, generator).reshape(grad.shape).to(grad.dtype)


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, owner: GradientQuantization, samples: bool) -> Tensor:
        ctx.owner, ctx.samples = owner, samples
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        owner = ctx.owner
        return quantize_gradient(grads[0], owner.bits, owner.kind, owner.generator, ctx.samples), None, None


def check_kind(kind: object) -> str:
    """Return `kind` if it names a gradient quantizer, else raise InvalidArgument."""
    if not isinstance(kind, str) or kind not in KINDS:
        raise InvalidArgument(f"gradient_quantizer must be one of {', '.join(KINDS)}, got {kind!r}")
    return kind


class GradientQuantization:
    """Quantize the output gradient of every quantized layer, until released.

    The products for the weight and for the input then both have quantized operands. The random numbers depend on the
    seed and the step.

    Args:
        model: The model, quantized at its policy.
        bits: Bit-width of the gradients.
        kind: "tensor", "sample" or "householder".
        seed: Seed of the stochastic rounding.
    """

    def __init__(self, model: nn.Module, bits: int, kind: str = "sample", seed: int = 0) -> None:
        self.bits, self.kind, self.seed = check_width(bits), check_kind(kind), seed
        self.generator = torch.Generator().manual_seed(seed)
        self.handles = [
            layer.register_forward_hook(
                lambda m, _a, out: _Backward.apply(out, self, getattr(m, "batched_axes", 0) == out.dim())
            )
            for _, layer in quantized_layers(model)
        ]

    def set(self, step: int) -> None:
        """Seed the random numbers of a step, which are thus the same after a resume."""
        self.generator.manual_seed(self.seed * 1_000_003 + step)

    def release(self) -> None:
        """Stop quantizing gradients."""
        for handle in self.handles:
            handle.remove()
