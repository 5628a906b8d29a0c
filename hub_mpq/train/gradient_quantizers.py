"""Fully quantized training: unbiased gradient quantizers (Chen et al., "A Statistical Framework for Low-bitwidth
Training of Deep Neural Networks", NeurIPS 2020): per tensor, per sample, block Householder; stochastic rounding."""

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
    """floor(x + u) with u uniform in [0, 1): the expectation is x."""
    return (x + torch.rand(x.shape, generator=generator).to(x)).floor()


def quantize_tensor(rows: Tensor, bits: int, generator: torch.Generator) -> Tensor:
    """One scale (2^b − 1)/range for all of rows [N, D]."""
    low, high = rows.min(), rows.max()
    scale = (2**bits - 1) / (high - low).clamp_min(TINY)
    return stochastic_round((rows - low) * scale, generator) / scale + low


def quantize_sample(rows: Tensor, bits: int, generator: torch.Generator) -> Tensor:
    """A scale for each row of [N, D]."""
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    scale = (2**bits - 1) / (high - low).clamp_min(TINY)
    return stochastic_round((rows - low) * scale, generator) / scale + low


def _reflect(x: Tensor) -> Tensor:
    """Householder reflection along axis 1 of [G, k, D] that turns e_1 into the constant 1/√k; its own inverse."""
    k = x.shape[1]
    if k == 1:
        return x
    n = torch.full((k,), k**-0.5, dtype=x.dtype, device=x.device)
    n[0] -= 1
    n = n / n.norm()
    return x - 2 * n[None, :, None] * (n[None, None] @ x)


def _blocks(rows: Tensor, order: Tensor, groups: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """(rotated and scaled blocks [G, k, D], their scales [G, k, 1], offsets [G]) of `groups` groups."""
    size = -(-len(rows) // groups)
    padded = torch.cat([rows[order], rows.new_zeros(size * groups - len(rows), rows.shape[1])])
    # the G largest rows lead one group each; the others are dealt out in turn
    x = padded.view(size, groups, -1).transpose(0, 1)
    span = (x.amax(2) - x.amin(2)).clamp_min(TINY)
    lead, rest = span[:, :1], span[:, 1:].amax(1, keepdim=True) if size > 1 else span[:, :1]
    # least Σ s^-2 under λ1·s1/√k + λ2·s2 = B
    first, others = lead ** (-1 / 3) * size ** (1 / 6), rest ** (-1 / 3) * max(size - 1, 1) ** (1 / 3)
    scale = torch.cat([first, others.expand(-1, size - 1)], 1)[..., None]
    turned = _reflect(x * scale)
    low, high = turned.amin((1, 2), keepdim=True), turned.amax((1, 2), keepdim=True)
    factor = (2**bits - 1) / (high - low).clamp_min(TINY)
    return turned * factor, scale * factor, low * factor


def quantize_householder(rows: Tensor, bits: int, generator: torch.Generator) -> Tensor:
    """Block Householder: a large row shares its range with many small ones: scale, reflect, round, undo.

    The number of groups, out of 1, 2, 4, … N, is the one of least variance bound Σ s^-2; N groups are the per-sample
    quantizer, so the bound is never above it. Rows are centred first. [scales from the paper's bound; equal groups and
    the search over their number: ours]
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
    if chosen is None:  # gradients that are not finite: the loop's own check will say so
        return rows
    turned, scale, low = chosen
    codes = stochastic_round(turned - low, generator) + low
    back = (_reflect(codes) / scale).transpose(0, 1).reshape(-1, rows.shape[1])[: len(rows)]
    out = torch.empty_like(rows)
    out[order] = back
    return out + middle


def quantize_gradient(grad: Tensor, bits: int, kind: str, generator: torch.Generator, samples: bool = False) -> Tensor:
    """`grad` on b-bit grids, unbiased, same shape. Rows are the samples of a convolution's gradient (`samples`, or
    [N, C, H, W]), and the vectors of all tokens of [..., features]."""
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
    """`kind` when it names a gradient quantizer, else InvalidArgument."""
    if not isinstance(kind, str) or kind not in KINDS:
        raise InvalidArgument(f"a gradient quantizer is one of {', '.join(KINDS)}, not {kind!r}")
    return kind


class GradientQuantization:
    """While attached, the gradient that enters every quantized layer from above is quantized to `bits`: both of its
    products, for the weight and for the input, then run on quantized operands. `seed` and the step make the draws."""

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
        """New draws for a step, the same after a resume."""
        self.generator.manual_seed(self.seed * 1_000_003 + step)

    def release(self) -> None:
        """Gradients are float again."""
        for handle in self.handles:
            handle.remove()
