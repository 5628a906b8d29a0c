"""The order of batches and epochs, and the weight of a batch among those of all processes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch

from ..errors import HubMPQError, InvalidArgument
from ..tasks.batch import to_device
from .hooks import Hooks
from .processes import is_sharded, least, most, own_share, raise_together, total, unshared, world


class Fed(NamedTuple):
    """A batch of one step.

    Attributes:
        epoch: Number of the epoch.
        index: Index of the batch in the epoch.
        batch: The batch, on its device.
        weight: Its part of the step's loss, times the number of processes; exactly 1 in a single process.
        samples: Number of samples of all processes.
    """

    epoch: int
    index: int
    batch: Any
    weight: float
    samples: int


def has_length(loader: Any) -> bool:
    """Whether a loader has a length. A DataLoader always has `__len__`, which raises over a stream."""
    try:
        len(loader)
    except TypeError:
        return False
    return True


def rereadable(loader: Iterable[Any], name: str = "train") -> None:
    """Raise InvalidArgument for an iterator: every stage reads the batches from the start."""
    if isinstance(loader, Iterator):
        raise InvalidArgument(
            f"{name} must be readable several times, got an iterator; pass a list, a DataLoader, or an object whose "
            "__iter__ starts again"
        )


def first_batch(loader: Iterable[Any]) -> Any:
    """Return the first batch of a loader.

    Raises:
        InvalidArgument: The loader is empty, or an iterator.
    """
    rereadable(loader, "the data")
    for batch in loader:
        return batch
    raise InvalidArgument("the data loader is empty")


def first_batches(loader: Iterable[Any], count: int, accelerator: Any, seed: int) -> list[Any]:
    """Return this process's first `count` batches, on its device.

    Raises:
        InvalidArgument: One of the processes has no batch; raised in all of them.
    """
    found = [to_device(batch, accelerator.device) for batch in islice(iter(own_share(loader, seed=seed)), count)]
    raise_together(None if found else InvalidArgument("the data loader is empty"))
    return found[: least(len(found))]  # the same number in each process, so that averages have equal weights


def batches_per_epoch(loader: Iterable[Any], share: float = 1.0) -> int:
    """Return the largest number of batches that a process has in one epoch.

    Raises:
        InvalidArgument: All loaders are empty, the loader has no length, or `share` is out of range.
    """
    if not 0 < share <= 1:
        raise InvalidArgument(f"share must be above 0 and at most 1, got {share}")
    if not has_length(loader):
        raise InvalidArgument("the data loader has no length; pass steps= for a stream")
    count = most(len(loader))  # type: ignore[arg-type]
    if count == 0:
        raise InvalidArgument("the data loader is empty")
    return math.ceil(count * share)


def prepared(loader: Iterable[Any], accelerator: Any) -> Iterable[Any]:
    """Return a loader of this process's share of the batches, shuffled by the accelerator's seed."""
    if isinstance(loader, torch.utils.data.DataLoader) and not (world()[1] > 1 and is_sharded(loader)):
        return accelerator.prepare(unshared(loader))  # type: ignore[no-any-return]
    return own_share(loader)


def set_epoch(loader: Any, epoch: int) -> None:
    """Set the epoch of the next pass on a loader, its sampler or its data set."""
    for part in (loader, getattr(loader, "sampler", None), getattr(loader, "dataset", None)):
        if hasattr(part, "set_epoch"):
            part.set_epoch(epoch)
            return


def feed(loader: Any, per_epoch: int, start: int, device: torch.device, hooks: Hooks) -> Iterator[Fed]:
    """Yield batches endlessly, from optimizer step `start` on; all processes take one batch at a time, together.

    A process whose share of an epoch is shorter than `per_epoch` repeats an earlier batch with weight zero. An error in
    the data of one process is raised in all of them.

    Args:
        loader: This process's batches.
        per_epoch: Batches in an epoch.
        start: Number of the first step.
        device: Device of the batches.
        hooks: What counts the samples and items of a batch.
    """
    batches = _batches(loader, per_epoch, start, device)
    while True:
        error: HubMPQError | None = None
        epoch, index, batch, mine, size = 0, 0, None, 0.0, 0
        try:
            epoch, index, batch, real = next(batches)
            if real:
                size = hooks.samples(batch)
                mine = hooks.items(batch) if world()[1] > 1 else 0.0
        except HubMPQError as found:
            error = found
        if world()[1] == 1:
            raise_together(error)
            yield Fed(epoch, index, batch, 1.0, size)
            continue
        weights, samples, failed = total(mine, size, error is not None)
        if failed:
            raise_together(error)
        yield Fed(epoch, index, batch, mine * world()[1] / max(weights, 1e-30), int(samples))


def _batches(loader: Any, per_epoch: int, start: int, device: torch.device) -> Iterator[tuple[int, int, Any, bool]]:
    """Yield (epoch, index in the epoch, batch, whether it is new)."""
    from accelerate import skip_first_batches

    epoch, skip = divmod(start, per_epoch)
    stream = not has_length(loader)
    padded = world()[1] > 1 and not stream
    spare: Any = None
    while True:
        set_epoch(loader, epoch)
        skips = isinstance(loader, torch.utils.data.DataLoader) and skip > 0 and not stream
        source = skip_first_batches(loader, skip) if skips else loader
        if skips:
            set_epoch(source, epoch)  # before Accelerate 1.15, the rest of a loader starts at epoch 0
        seen = 0
        for index, batch in enumerate(source, start=skip if skips else 0):
            seen = index + 1
            if index < skip:
                continue
            if index >= per_epoch:
                break
            spare = to_device(batch, device)
            yield epoch, index, spare, True
        if padded:
            for index in range(max(seen, skip), per_epoch):
                if spare is None:
                    spare = to_device(next(iter(loader), None), device)
                if spare is None:
                    break
                yield epoch, index, spare, False
                seen = per_epoch
        if not seen:
            alone = world()[1] == 1
            raise InvalidArgument(
                "the data loader is empty" if alone else "this process has no batch; use fewer processes"
            )
        # the epochs of a stream before `start` are only known once it has been read
        epoch, skip = epoch + 1, max(skip - seen, 0) if stream else 0
