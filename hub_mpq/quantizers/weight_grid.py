"""Scales and zero points of weights."""

from __future__ import annotations

import torch
from torch import Tensor

from .grouped import group_dtype


@torch.no_grad()
def weight_grid(
    weight: Tensor,
    bits: int,
    *,
    group_size: int | None = None,
    symmetric: bool = True,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Stub until the real one is merged: absmax."""
    w = weight.detach().float()
    rows, cols = w.shape
    size = cols if group_size is None else group_size
    pad = -cols % size
    g = torch.nn.functional.pad(w, (0, pad)).view(rows, -1, size)
    if symmetric or bits == 1:
        top = g.abs().mean(-1) if bits == 1 else g.abs().amax(-1) / (2 ** (bits - 1) - 1)
        scale, zero = torch.where(top > 0, top, 1.0), None
    else:
        low, high = g.amin(-1).clamp(max=0), g.amax(-1).clamp(min=0)
        scale = (high - low) / (2**bits - 1)
        scale = torch.where(scale > 0, scale, 1.0)
        zero = (-low / scale).round().clamp(0, 2**bits - 1).int() - 2 ** (bits - 1)
    if group_size is not None:
        scale = scale.to(group_dtype(scale))
    return scale, zero
