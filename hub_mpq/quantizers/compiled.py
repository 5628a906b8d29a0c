"""The passes of fake_quantize_kernels.py as one formula each, optionally compiled with torch.compile.

Nothing is compiled on import or before `compiler_works`. The first use takes ten to twenty seconds; afterwards the
kernels are in inductor's disk cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def ends(like: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """The ends of a grid as tensors; Python numbers would be compiled in, giving one kernel per bit-width."""
    return torch.full((), float(low), device=like.device), torch.full((), float(high), device=like.device)


def forward_formula(x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """clamp(round(x/s), low, high)·s."""
    return (x / scale).round().clamp(low, high) * scale


def back_formula(
    g: Tensor, x: Tensor, scale: Tensor, low: Tensor, high: Tensor, *, binary: bool = False
) -> tuple[Tensor, Tensor]:
    """(dx, ds without its factor, with the shape of `scale`)."""
    v = x / scale
    inside = (v > low) & (v < high)
    r = torch.where(x < 0, -1.0, 1.0) if binary else v.round().clamp(low, high)
    terms = g * (r - torch.where(inside, v, 0.0))
    return torch.where(inside, g, 0.0), terms.sum_to_size(scale.shape)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)


def _own(x: Tensor) -> Tensor:
    """The same memory as a tensor that is not a view; for views the compiler also guards the shape of their base."""
    return x.new_empty(0).set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())


def forward(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """The compiled `forward_formula`, for x [n] or [rows, columns]."""
    out: Tensor = _compiled(forward_formula)(_own(x), _own(scale), *ends(x, low, high))
    return out


def back(g: Tensor, x: Tensor, scale: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """The compiled `back_formula`."""
    out: tuple[Tensor, Tensor] = _compiled(back_formula)(_own(g), _own(x), _own(scale), *ends(x, low, high))
    return out


@functools.cache
@torch.no_grad()
def compiler_works(device: str = "cpu") -> bool:
    """Whether the passes compile here (on a CPU with a C++ compiler) and match the formula; tried once per process."""
    x = torch.linspace(-1, 1, 1 << 17, device=device)  # as large as what runs compiled: small sums use another kernel
    args = (x.flip(0), x, torch.full((1,), 0.25, device=device), -2, 1)
    try:
        q, (dx, ds) = forward(*args[1:]), back(*args)
    except Exception:  # torch.compile can fail in many ways
        return False
    want_dx, want_ds = back_formula(*args[:3], *ends(x, -2, 1))
    close = torch.allclose(ds, want_ds, rtol=1e-3)
    return close and torch.equal(q, forward_formula(*args[1:3], *ends(x, -2, 1))) and torch.equal(dx, want_dx)
