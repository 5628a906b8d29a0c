"""Held-out batches: one half to choose a policy on, the other to report it on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
from torch.utils.data import DataLoader, SequentialSampler

from ..errors import InvalidArgument
from ..train.processes import is_sharded, seeded
from .measure import PolicyMeter
from .prediction import SAMPLES as CHECKED_SAMPLES
from .prediction import TOKENS as CHECKED_TOKENS
from .train_val_split import cut, drawn

SAMPLES, TOKENS = 2048, 4096
"""What is held out at most, both halves together: so many samples, or tokens."""
CALIBRATION = 16
"""Batches that scales and norms are estimated on, as `HubMPQ.apply_policy` takes them."""


@dataclass(frozen=True)
class HeldOut:
    """Two halves of held-out batches, which share no sample.

    Args:
        choosing: What policies are chosen on.
        reporting: What the chosen one is reported on.
        data: What they are, in words.
    """

    choosing: list[Any]
    reporting: list[Any]
    data: str

    def few(self, meter: PolicyMeter) -> list[Any]:
        """The small sample of a check: the first choosing batches, with up to 128 samples or 512 tokens; one at least,
        cut where it is larger."""
        taken: list[Any] = []
        samples = tokens = 0
        for batch in self.choosing:
            rows, items, of_tokens = meter.items(batch)
            while (rows > CHECKED_SAMPLES or (of_tokens and items > CHECKED_TOKENS)) and rows > 1 and not taken:
                batch = cut(batch, 0)
                rows, items, of_tokens = meter.items(batch)
            samples, tokens = samples + rows, tokens + (items if of_tokens else 0)
            if taken and (samples > CHECKED_SAMPLES or tokens > CHECKED_TOKENS):
                break
            taken.append(batch)
        return taken


def hold_out(meter: PolicyMeter, batches: Iterable[Any], data: str) -> HeldOut:
    """Take up to 2,048 samples, or 4,096 tokens, and split them: by turns batch for batch, or each batch in two where
    there are fewer than four.

    Args:
        meter: Tells what a batch holds.
        batches: The batches; no more are read than are taken.
        data: What they are, in words.

    Raises:
        InvalidArgument: There are fewer than two samples.
    """
    taken: list[Any] = []
    samples = tokens = 0
    for batch in batches:
        rows, items, of_tokens = meter.items(batch)
        while of_tokens and items > TOKENS and rows > 1:
            batch = cut(batch, 0)
            rows, items, of_tokens = meter.items(batch)
        taken.append(batch)
        samples, tokens = samples + rows, tokens + (items if of_tokens else 0)
        if samples >= SAMPLES or tokens >= TOKENS:
            break
    if not taken:
        raise InvalidArgument(f"beside what calibrates, {data} hold nothing to measure on: give more than one sample")
    if len(taken) >= 4:
        return HeldOut(taken[::2], taken[1::2], data)
    try:
        return HeldOut([cut(batch, 0) for batch in taken], [cut(batch, 1) for batch in taken], data)
    except InvalidArgument:  # a batch of one sample
        if len(taken) < 2:
            raise InvalidArgument("a policy is chosen and reported on different samples: give two at least") from None
        return HeldOut(taken[::2], taken[1::2], data)


def spread(loader: Iterable[Any], seed: int) -> Iterable[Any]:
    """Batches of a loader from all over its data: a DataLoader that reads in order, perhaps class by class, is read in
    an order drawn from `seed`. The loader itself stays as it is; others are read as they come."""
    if not isinstance(loader, DataLoader) or type(loader.sampler) is not SequentialSampler or is_sharded(loader):
        return seeded(loader, seed=seed)
    indices = None if loader.batch_size is None else drawn(loader)
    if indices is None:
        return seeded(loader, seed=seed)
    order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(seed)).tolist()
    return DataLoader(
        loader.dataset,
        sampler=[indices[i] for i in order],
        batch_size=loader.batch_size,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
    )


def beyond(train: Iterable[Any], seed: int, scored: int) -> tuple[list[Any], Iterable[Any]]:
    """(batches to calibrate on, the batches behind them, which no score was read from) of training data.

    Args:
        train: The training data.
        seed: Of the scores, which were read from the first batches in the order that it shuffles to.
        scored: From how many.
    """
    batches = iter(seeded(train, seed=seed))
    first = list(islice(batches, max(CALIBRATION, scored)))
    return first[:CALIBRATION], batches


def apart(batches: Iterable[Any], seed: int) -> tuple[list[Any], Iterable[Any]]:
    """(batches to calibrate on, batches to measure on) of data that are used for nothing else: a quarter of the
    batches calibrate, 16 at most; where there are fewer than four, half of each, or the first one where a batch is a
    single sample. Raises InvalidArgument where there is no batch."""
    if isinstance(batches, (bool, str)):
        raise InvalidArgument(f"validate takes batches, such as a DataLoader or a list, not {batches!r}")
    rest = iter(spread(batches, seed))
    first = list(islice(rest, 4 * CALIBRATION))
    if not first:
        raise InvalidArgument("validate holds no batch")
    count = len(first) // 4
    if count:
        return first[:count], chain(first[count:], rest)
    try:
        return [cut(batch, 0) for batch in first], [cut(batch, 1) for batch in first]
    except InvalidArgument:  # a batch of one sample
        return first[:1], first[1:]
