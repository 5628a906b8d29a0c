"""Compare the wall time of calls: warmed up, alternating, median of many."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

LEAST, MOST = 9, 51
"""Bounds of the number of timings of each call, which is odd."""
COUNT = 1e-3
"""Minimum seconds of one timing; shorter calls are repeated."""
SECONDS = 0.25
"""Total seconds of the timings of one call, unless the minimum number takes longer."""

clock = time.perf_counter


@dataclass(frozen=True)
class Timing:
    """The time of one call.

    Args:
        seconds: Median, in seconds.
        spread: Half the interquartile range, in seconds.
        counts: Number of timings.

    Example:
        >>> from hub_mpq.runtime import Timing
        >>> Timing(seconds=0.005, spread=0.0001, counts=51).spread
        0.0001
    """

    seconds: float
    spread: float
    counts: int


@torch.no_grad()
def time_calls(calls: Sequence[Callable[[], Any]], seconds: float = SECONDS) -> list[Timing]:
    """Time several calls alternately, so that a slowdown of the machine affects all of them.

    Args:
        calls: Functions without arguments.
        seconds: Approximate total time of the timings of one call, in seconds.

    Returns:
        The timing of each call, in the same order.

    Example:
        >>> from hub_mpq.runtime import time_calls
        >>> short, long = time_calls([lambda: sum(range(100)), lambda: sum(range(100_000))], seconds=0.05)
        >>> short.seconds < long.seconds
        True
    """
    first = []
    for call in calls:
        call()  # warm-up: compilation and memory layout
        first.append(_count(call, 1))
    repeats = [max(1, round(COUNT / max(took, 1e-9))) for took in first]
    longest = max(took * n for took, n in zip(first, repeats, strict=True))
    rounds = min(max(int(seconds / max(longest, 1e-9)), LEAST), MOST) | 1
    found: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for times, call, n in zip(found, calls, repeats, strict=True):
            times.append(_count(call, n))
    return [_timing(times) for times in found]


def _count(call: Callable[[], Any], repeats: int) -> float:
    began = clock()
    for _ in range(repeats):
        call()
    return (clock() - began) / repeats


def _timing(times: list[float]) -> Timing:
    low, middle, high = statistics.quantiles(times, n=4)
    return Timing(middle, (high - low) / 2, len(times))


@contextmanager
def threads_of(count: int) -> Iterator[None]:
    """Let torch, and the engines built in the meantime, use this many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def batch_of(example: Any, size: int) -> Any:
    """Repeat the first sample of an example to a batch of `size` equal samples: a tuple or a mapping.

    The batch size is the first axis of the first tensor; tensors with another first axis are not changed.
    """
    from .rebuilt import as_batch

    batch = as_batch(example)
    held = next((len(x) for x in tree_leaves(batch) if isinstance(x, Tensor) and x.dim()), 0)

    def repeated(x: Any) -> Any:
        return x[:1].repeat_interleave(size, 0) if isinstance(x, Tensor) and x.dim() and len(x) == held else x

    return tree_map(repeated, batch)
