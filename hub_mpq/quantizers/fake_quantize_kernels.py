"""The forward and backward pass of a quantizer.

On a CPU they run in pieces small enough to stay in the core's own cache through all operations, so that main memory is
read and written once. Neither stores intermediate results: the backward pass starts from x and the scale again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import compiled

_PIECE = 1 << 16  # elements per thread: the four float32 buffers of a piece fit a cache of 1 MiB
_PIECE_DEVICE = 1 << 24  # off the CPU, pieces only bound the scratch memory

# (g, v, low, high) → g where low < v < high, else 0, in one pass
_masked = torch.ops.aten.hardtanh_backward.default
_masked_out = torch.ops.aten.hardtanh_backward.grad_input


class Grid(NamedTuple):
    """A range of integers that contains 0: `low` is qmin − z and `high` is qmax − z.

    `binary`: {−1, +1}, without 0. `factor`: factor of the scale's gradient (LSQ's g). `compiled`: use the compiled
    passes for large tensors.
    """

    low: int
    high: int
    binary: bool = False
    factor: float = 1.0
    compiled: bool = False


def wide(x: Tensor) -> Tensor:
    """`x` in the dtype that quantizers compute in: float32, or float64 if it has that already."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def to_int(x: Tensor, scale: Tensor, low: int | Tensor, high: int | Tensor, *, binary: bool = False) -> Tensor:
    """Compute the integers of a tensor on a grid, clamp(round(x / scale), low, high).

    Args:
        x: The tensor, of any shape.
        scale: The step size(s), positive; broadcasts against `x`.
        low: The smallest integer, qmin − zero point.
        high: The largest integer, qmax − zero point.
        binary: Return the signs −1 and +1 instead (+1 for 0).

    Returns:
        The integers, as a float tensor with the shape of `x`.

    Example:
        >>> import torch
        >>> from hub_mpq.quantizers import to_int
        >>> to_int(torch.tensor([-9.0, 0.3, 1.6]), torch.tensor(0.5), -8, 7)
        tensor([-8.,  1.,  3.])
    """
    if binary:
        return torch.where(x < 0, -1.0, 1.0).to(x.dtype)
    return torch.div(x, scale).round_().clamp_(low, high)


def on_grid(x: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """The nearest grid points, with x's shape and dtype, without a gradient (`fake_quantize` has one)."""
    if (form := _form(x, scale)) is None:
        q = to_int(wide(x), scale, grid.low, grid.high, binary=grid.binary).mul_(scale)
        return q if q.dtype == x.dtype else q.to(x.dtype)
    x, s, size, stride = form
    xs = x.as_strided(size, stride)
    if _by_compiler(xs, grid):
        return compiled.forward(xs, s, grid.low, grid.high).to(x.dtype).as_strided(x.shape, x.stride())
    q = torch.empty_like(x)
    for sp, (xp, qp) in _pieces(s, xs, q.as_strided(size, stride)):
        if grid.binary or xp.dtype not in (torch.float32, torch.float64):
            qp.copy_(to_int(wide(xp), sp, grid.low, grid.high, binary=grid.binary).mul_(sp))
        else:
            torch.div(xp, sp, out=qp).round_().clamp_(grid.low, grid.high).mul_(sp)
    return q


def pull_back(
    g: Tensor, x: Tensor, scale: Tensor, grid: Grid, *, of_x: bool, of_scale: bool, spare: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """(gradient of x, gradient of the scale) from `g`, the gradient of `on_grid`; None for those not requested.

    LSQ (Esser et al., 2020, eqs. 1–5): with v = x/s and m = 1 strictly inside the range, dx = g·m and
    ds = factor · Σ g·(round(v) − m·v), inside and outside in one expression. `spare`: g may be overwritten.
    """
    if (form := _form(x, scale)) is None:
        return _back_whole(g, x, scale, grid, of_x, of_scale)
    x, s, size, stride = form
    if g.dtype != x.dtype or not _same_strides(g, x):
        g, spare = torch.empty_like(x).copy_(g), True
    xs, gs = x.as_strided(size, stride), g.as_strided(size, stride)
    if _by_compiler(xs, grid):
        flat, ds = compiled.back(gs, xs, s, grid.low, grid.high)
        dx = flat.as_strided(x.shape, x.stride())
    else:
        dx = g if spare or not of_x else torch.empty_like(x)
        ds = _back(gs, xs, s, grid, dx.as_strided(size, stride) if of_x else None, of_scale)
    return (dx if of_x else None), (ds.mul(grid.factor).view_as(scale).to(scale) if of_scale else None)


def _back_whole(
    g: Tensor, x: Tensor, scale: Tensor, grid: Grid, of_x: bool, of_scale: bool
) -> tuple[Tensor | None, Tensor | None]:
    """`pull_back` in as few calls as possible: after a large layer each call is cold and takes ten times as long."""
    g, v = wide(g), torch.div(wide(x), scale)
    dx = ds = None
    if of_x:
        dx = _masked(g, v, grid.low, grid.high)
        dx = dx if dx.dtype == x.dtype else dx.to(x.dtype)
    if of_scale:
        w = _masked(v, v, grid.low, grid.high)
        r = to_int(v, v.new_ones(()), -1, 1, binary=True) if grid.binary else v.round_().clamp_(grid.low, grid.high)
        ds = r.sub_(w).mul_(g).sum_to_size(scale.shape).mul_(grid.factor).to(scale.dtype)
    return dx, ds


def _back(g: Tensor, x: Tensor, s: Tensor, grid: Grid, dx: Tensor | None, of_scale: bool) -> Tensor:
    """Fill `dx` and return the gradient of `s` without its factor, in pieces that fit the cache."""
    sums: list[Tensor] = []
    plain = x.dtype in (torch.float32, torch.float64)
    v = w = r = x[:0]
    for sp, (xp, gp, dp) in _pieces(s, x, g, g if dx is None else dx):
        if len(v) < len(xp):
            v, w, r = (torch.empty(xp.shape, dtype=x.dtype if plain else torch.float32, device=x.device) for _ in "vwr")
        elif len(v) > len(xp):
            v, w, r = v[: len(xp)], w[: len(xp)], r[: len(xp)]
        xw, gw = (xp, gp) if plain else (xp.float(), gp.float())
        torch.div(xw, sp, out=v)
        if of_scale:
            _masked_out(v, v, grid.low, grid.high, grad_input=w)
            if grid.binary:
                torch.sub(to_int(v, sp, -1, 1, binary=True), w, out=r)
            else:
                torch.round(v, out=r).clamp_(grid.low, grid.high).sub_(w)
            if s.dim() == 1:
                sums.append(torch.dot(gw, r))
            else:
                sums.append(r.mul_(gw).sum(1 if len(s) > 1 else 0))
        if dx is not None:
            if plain:
                _masked_out(gw, v, grid.low, grid.high, grad_input=dp)
            else:
                dp.copy_(_masked_out(gw, v, grid.low, grid.high, grad_input=w))
    if not sums:
        return s.new_zeros(s.shape)
    if s.dim() == 2 and len(s) > 1:
        return torch.cat(sums)
    # partial sums are added in double precision, since hundreds of them cancel
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum(0, dtype=torch.float64)


def _by_compiler(x: Tensor, grid: Grid) -> bool:
    return grid.compiled and not grid.binary and x.numel() > _PIECE


def _form(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, tuple[int, ...], tuple[int, ...]] | None:
    """(x dense in memory, scale, size, stride): x as [all], or as [rows, columns] with one scale per row or column.

    None if there is no such view, or no gain from one (a single piece, or a compiler is tracing).
    """
    n, count = scale.numel(), x.numel()
    if count <= _PIECE or torch.compiler.is_compiling():
        return None
    plain = x.is_contiguous()
    if n == 1:
        if not (plain or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))):
            x = x.contiguous()
        return x, scale.reshape(1), (count,), (1,)
    if scale.dim() != x.dim():
        return None
    if scale.shape[0] == n:
        if not (plain or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))):
            x = x.contiguous()
        return x, scale.reshape(n, 1), (n, count // n), (count // n, 1)
    if scale.shape[-1] == n:
        return x if plain else x.contiguous(), scale.reshape(1, n), (count // n, n), (n, 1)
    return None


def _same_strides(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of equal shape have the same memory layout; strides of axes of length 1 are ignored."""
    return a.stride() == b.stride() or all(
        p == q or size == 1 for p, q, size in zip(a.stride(), b.stride(), a.shape, strict=True)
    )


def _pieces(scale: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
    """(scale, pieces) along the first axis."""
    first = tensors[0]
    limit = _PIECE * torch.get_num_threads() if first.device.type == "cpu" else _PIECE_DEVICE
    if first.numel() <= limit:
        yield scale, tensors
        return
    rows = limit if first.dim() == 1 else max(limit // first.shape[1], 1)
    parts = zip(*(t.split(rows) for t in tensors), strict=True)
    if scale.dim() == 2 and len(scale) > 1:
        yield from zip(scale.split(rows), parts, strict=True)
    else:
        for part in parts:
            yield scale, part
