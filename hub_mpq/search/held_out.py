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
"""Maximum number of held-out samples, or tokens, in both halves together."""
CALIBRATION = 16
"""Number of batches for calibrating scales and re-estimating norms, as in `HubMPQ.apply_policy`."""


@dataclass(frozen=True)
class HeldOut:
    """Two halves of held-out batches, which share no sample.

    Args:
        choosing: Batches that the policy is chosen on.
        reporting: Batches that the reported figures are measured on.
        data: Description of the data.
    """

    choosing: list[Any]
    reporting: list[Any]
    data: str

    def few(self, meter: PolicyMeter) -> list[Any]:
        """Return a small sample for a check: the first choosing batches, with up to 128 samples or 512 tokens.

        There is at least one batch, cut if it is larger.
        """
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
    """Take up to 2,048 samples, or 4,096 tokens, and split them into two halves.

    Batches alternate between the halves. If there are fewer than four, each batch is cut in two.

    Args:
        meter: What counts the samples and items of a batch.
        batches: The batches; only as many as needed are read.
        data: Description of the data.

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
        raise InvalidArgument(f"{data} must hold more than one sample, since some are used for calibration")
    if len(taken) >= 4:
        return HeldOut(taken[::2], taken[1::2], data)
    try:
        return HeldOut([cut(batch, 0) for batch in taken], [cut(batch, 1) for batch in taken], data)
    except InvalidArgument:  # a batch of one sample
        if len(taken) < 2:
            raise InvalidArgument("validation needs at least two samples to choose and report on") from None
        return HeldOut(taken[::2], taken[1::2], data)


def spread(loader: Iterable[Any], seed: int) -> Iterable[Any]:
    """Return batches from all parts of the data of a loader.

    A DataLoader that reads in order, perhaps class by class, is read in a random order given by `seed`. The loader
    itself is not changed; other loaders keep their order.
    """
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
    """Split training data into batches for calibration and later batches that no score was computed from.

    Args:
        train: The training data.
        seed: Seed of the scores, which were computed from the first batches in the order that it shuffles to.
        scored: Number of those batches.

    Returns:
        (batches to calibrate on, batches to measure on).
    """
    batches = iter(seeded(train, seed=seed))
    first = list(islice(batches, max(CALIBRATION, scored)))
    return first[:CALIBRATION], batches


def apart(batches: Iterable[Any], seed: int) -> tuple[list[Any], Iterable[Any]]:
    """Split data that are used for nothing else into batches to calibrate on and batches to measure on.

    A quarter of the batches, 16 at most, is for calibration. If there are fewer than four, it is half of each batch, or
    the first batch if one of them is a single sample.

    Returns:
        (batches to calibrate on, batches to measure on).

    Raises:
        InvalidArgument: There is no batch, or `batches` is not iterable as batches.
    """
    if isinstance(batches, (bool, str)):
        raise InvalidArgument(f"validate must be batches, such as a DataLoader or a list, got {batches!r}")
    rest = iter(spread(batches, seed))
    first = list(islice(rest, 4 * CALIBRATION))
    if not first:
        raise InvalidArgument("validate must hold at least one batch")
    count = len(first) // 4
    if count:
        return first[:count], chain(first[count:], rest)
    try:
        return [cut(batch, 0) for batch in first], [cut(batch, 1) for batch in first]
    except InvalidArgument:  # a batch of one sample
        return first[:1], first[1:]
