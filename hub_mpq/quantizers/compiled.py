"""The passes of fake_quantize_kernels.py as one formula each, and through torch.compile for those who ask.

Nothing compiles on import, nor before `compiler_works`. The first use costs ten to twenty seconds; inductor's cache on
disk holds the kernels afterwards.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def ends(like: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """The ends of a grid as tensors: numbers would be compiled in, one kernel for each width."""
    return torch.full((), float(low), device=like.device), torch.full((), float(high), device=like.device)


def forward_formula(x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """clamp(round(x/s), low, high)·s."""
    return (x / scale).round().clamp(low, high) * scale


def back_formula(
    g: Tensor, x: Tensor, scale: Tensor, low: Tensor, high: Tensor, *, binary: bool = False
) -> tuple[Tensor, Tensor]:
    """(dx, ds before its factor, of scale's shape)."""
    v = x / scale
    inside = (v > low) & (v < high)
    r = torch.where(x < 0, -1.0, 1.0) if binary else v.round().clamp(low, high)
    terms = g * (r - torch.where(inside, v, 0.0))
    return torch.where(inside, g, 0.0), terms.sum_to_size(scale.shape)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)


def _own(x: Tensor) -> Tensor:
    """The same memory as a tensor that is no view: of a view the compiler guards the shape of what it is a view of."""
    return x.new_empty(0).set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())


def forward(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """`forward_formula`, compiled; x [n] or [rows, columns]."""
    out: Tensor = _compiled(forward_formula)(_own(x), _own(scale), *ends(x, low, high))
    return out


def back(g: Tensor, x: Tensor, scale: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """`back_formula`, compiled."""
    out: tuple[Tensor, Tensor] = _compiled(back_formula)(_own(g), _own(x), _own(scale), *ends(x, low, high))
    return out


@functools.cache
@torch.no_grad()
def compiler_works(device: str = "cpu") -> bool:
    """Whether the passes compile here (a C++ compiler on a CPU) and equal the formula; tried once a process."""
    x = torch.linspace(-1, 1, 1 << 17, device=device)  # as large as what runs compiled: small sums are another kernel
    args = (x.flip(0), x, torch.full((1,), 0.25, device=device), -2, 1)
    try:
        q, (dx, ds) = forward(*args[1:]), back(*args)
    except Exception:  # torch.compile fails in many ways: each means that there is no kernel
        return False
    want_dx, want_ds = back_formula(*args[:3], *ends(x, -2, 1))
    close = torch.allclose(ds, want_ds, rtol=1e-3)
    return close and torch.equal(q, forward_formula(*args[1:3], *ends(x, -2, 1))) and torch.equal(dx, want_dx)
