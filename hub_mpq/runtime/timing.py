"""Wall time of calls that are compared: warmed up, in turn, the median of many."""

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
"""Counts of each call, an odd number."""
COUNT = 1e-3
"""Seconds that one count takes at least: shorter calls are repeated in it."""
SECONDS = 0.25
"""What the counts of one call take together where that are more than the least."""

clock = time.perf_counter


@dataclass(frozen=True)
class Timing:
    """How long one call takes.

    Args:
        seconds: The median.
        spread: Half the distance of the quartiles, in seconds.
        counts: How often it was timed.
    """

    seconds: float
    spread: float
    counts: int


@torch.no_grad()
def time_calls(calls: Sequence[Callable[[], Any]], seconds: float = SECONDS) -> list[Timing]:
    """Time several calls in turn, so that a machine that slows down slows all of them.

    Args:
        calls: What is timed.
        seconds: What the counts of one call take, about.
    """
    first = []
    for call in calls:
        call()  # what is compiled or laid out at the first call
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
    """Let torch, and what is built meanwhile, use this many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def batch_of(example: Any, size: int) -> Any:
    """The first sample of an example as a batch of `size` equal samples: a tuple or a mapping.

    Tensors whose first axis is not the batch, which is that of the first tensor, stay as they are.
    """
    from .rebuilt import as_batch

    batch = as_batch(example)
    held = next((len(x) for x in tree_leaves(batch) if isinstance(x, Tensor) and x.dim()), 0)

    def repeated(x: Any) -> Any:
        return x[:1].repeat_interleave(size, 0) if isinstance(x, Tensor) and x.dim() and len(x) == held else x

    return tree_map(repeated, batch)
