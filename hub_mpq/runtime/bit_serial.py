"""EBS's binary decomposition as an engine: bit planes in 64-bit words, AND and popcount, compiled by Numba."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core import LayerBits, LayerSpec
from .bit_serial_kernels import BLOCK, kernels
from .bit_serial_vectors import LANES, SLACK
from .exchanged import without_codes
from .fused_layer import Activation, FusedLayer
from .in_process import InProcess
from .integer_layer import IntegerLayer, inexact_sums, integer_menu

WORD = 64
_NO_FLOATS, _NO_CODES = np.empty(0, np.float32), np.empty(0, np.uint8)


def words(bits: Tensor) -> Tensor:
    """Pack {0, 1} [..., length] into 64-bit words, int64 [..., words], the first value in the lowest bit."""
    padded = F.pad(bits.to(torch.uint8), (0, -bits.shape[-1] % WORD))
    packed = np.packbits(padded.numpy(), axis=-1, bitorder="little").view("<u8").astype(np.int64)
    return torch.from_numpy(packed)


def weight_planes(codes: Tensor) -> tuple[Tensor, list[int], bool]:
    """Decompose the codes of a weight into as few bit planes as possible.

    Args:
        codes: int8, of any shape.

    Returns:
        ({0, 1} [planes, *shape], the factor of each plane, whether all codes are ±1). If they are, code = 2·plane − 1,
        otherwise code = the sum of factor · plane.
    """
    codes = codes.long()
    if bool((codes.abs() == 1).all()):
        return (codes > 0)[None], [2], True
    bits = max(int(codes.max()).bit_length(), int(-codes.min() - 1).bit_length() if bool((codes < 0).any()) else 0) + 1
    planes = torch.stack([codes >> i & 1 for i in range(bits)])
    factors = [1 << i for i in range(bits - 1)] + [-(1 << (bits - 1))]
    kept = [i for i in range(bits) if bool(planes[i].any())] or [0]
    return planes[kept], [factors[i] for i in kept], False


def _split(function: Callable[[int, int], None], count: int) -> None:
    """Call a function on ranges that cover `count` items, with as many threads as torch uses."""
    threads = torch.get_num_threads()
    if threads == 1 or count <= BLOCK:
        function(0, count)
        return
    step = -(-count // (threads * BLOCK)) * BLOCK
    starts = range(0, count, step)
    list(_pool(os.getpid(), threads).map(function, starts, [min(s + step, count) for s in starts]))


@lru_cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """The thread pool of a process; a fork does not inherit threads."""
    return ThreadPoolExecutor(threads, "bit_serial")


class BitSerialLayer(nn.Module):
    """An integer layer on bit planes: from codes of the input and an optional residual to float32 or codes."""

    multiplied: tuple[Any, ...]
    added: tuple[Any, ...]

    def __init__(self, plan: FusedLayer) -> None:
        super().__init__()
        layer = plan.layer
        self.plan, self.shape = without_codes(plan), layer.weight.shape
        rows = layer.weight.permute(0, 2, 3, 1).flatten(1) if layer.convolution else layer.weight
        planes, factors, self.one_bit = weight_planes(rows)
        blocked = words(planes).unflatten(1, (layer.groups, -1)).permute(1, 2, 0, 3)  # [groups, outputs, planes, words]
        blocked = F.pad(blocked, (0, 0, 0, 0, 0, -blocked.shape[1] % LANES)).unflatten(1, (-1, LANES))
        zero = layer.grid.zero_point
        self.channels = self.shape[1]  # of one group
        # the words of neighbouring pixels are adjacent: packed once, then copied for each position of the kernel
        self.adjacent = self.channels % WORD == 0 and layer.groups == 1 and layer.dilation[1] == 1
        scale = layer.scale * layer.grid.scale
        bias = torch.zeros_like(scale) if layer.bias is None else layer.bias
        for name, tensor in {
            "weight": blocked.permute(0, 1, 3, 4, 2).contiguous(),
            "factors": torch.tensor(factors),
            "constant": (-zero * rows.long().sum(1)).int(),
            "scale": scale,
            "bias": bias.float(),
        }.items():
            self.register_buffer(name, tensor, persistent=False)
        # NumPy views, since converting a tensor takes microseconds
        self.multiplied = (self.weight.numpy().view(np.uint64), self.factors.numpy(), self.one_bit)
        self.added = tuple(tensor.numpy() for tensor in (self.constant, self.scale, self.bias))
        activation, infinity = plan.activation, float("inf")
        low, high = -infinity, infinity
        if activation is not None:
            low, high = (0.0, infinity) if activation.name == "relu" else (activation.low, activation.high)
        self.cut = (np.float32(low), np.float32(high))
        grid = plan.output
        values = (1.0, 0, 0) if grid is None else (1.0 / grid.scale, grid.zero_point, grid.top)
        self.grid = tuple(map(np.float32, values))

    def forward(self, x: Tensor, summand: Tensor | None = None) -> Tensor:
        layer = self.plan.layer
        outputs, channels = self.shape[0], self.channels * layer.groups
        if layer.convolution:
            x = layer.padded(x, layer.grid.zero_point)
            batch, _, height, width = x.shape
            sides = [self._side(axis, x.shape[2 + axis]) for axis in (0, 1)]
            leading, shape = (batch, *sides), (height, width, *sides)
            window = (*self.shape[2:], *(layer.stride or ()), *layer.padding, *layer.dilation)
            codes = x.permute(0, 2, 3, 1)
            summand = None if summand is None else summand.permute(0, 2, 3, 1)
        else:
            leading, shape, window = x.shape[:-1], (1, 1, 1, 1), (1, 1, 1, 1, 0, 0, 1, 1)
            codes = x
        flat = codes.contiguous().numpy().reshape(-1)
        pixels, count = (flat.size // channels, channels // WORD) if self.adjacent else (0, 0)
        size = (layer.grid.bits, pixels, count)
        planes = np.empty(prod(size) + SLACK, np.uint64)[: prod(size)].reshape(size)
        as_codes = self.plan.output is not None
        out = torch.empty((*leading, outputs), dtype=torch.uint8 if as_codes else torch.float32)
        made = out.numpy().reshape(-1)
        written = (_NO_FLOATS, made) if as_codes else (made, _NO_CODES)
        second = _NO_FLOATS if summand is None else summand.contiguous().numpy().reshape(-1)
        compiled = kernels()

        def pack(start: int, stop: int) -> None:
            compiled.pack(flat, planes, start, stop)

        def multiply(start: int, stop: int) -> None:
            compiled.multiply(
                *(flat, layer.grid.zero_point, planes, shape, window, self.channels, *self.multiplied),
                *(*self.added, second, self.cut, self.grid, *written, start, stop),
            )

        _split(pack, pixels)
        _split(multiply, made.size // outputs)
        return out.permute(0, 3, 1, 2) if layer.convolution else out

    def _side(self, axis: int, length: int) -> int:
        """Height or width of the output."""
        layer = self.plan.layer
        reach = layer.dilation[axis] * (self.shape[2 + axis] - 1) + 1
        return (length + 2 * layer.padding[axis] - reach) // layer.stride[axis] + 1


class BitSerial(InProcess):
    """Products of bit planes, whose cost grows with the product of both bit-widths: for 1- and 2-bit layers."""

    name, package, extra, time_by_width = "bit_serial", "numba", "bit-serial", True
    layer_class = BitSerialLayer

    def menu(self, layer: LayerSpec) -> tuple[LayerBits, ...]:
        return integer_menu(layer, saturates=False)

    def inexact(self, layer: IntegerLayer) -> str | None:
        return inexact_sums(layer, saturates=False)

    def takes(self, plan: FusedLayer, activation: Activation) -> bool:
        return activation.name in ("relu", "clip")
