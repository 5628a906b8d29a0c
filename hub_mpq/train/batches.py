"""Which batch comes next, in which epoch, and how much it counts among the processes' batches."""

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
    """epoch, index in it, the batch; weight: the batch's part of the step's loss times the number of processes
    (exactly 1 alone); samples: of all processes."""

    epoch: int
    index: int
    batch: Any
    weight: float
    samples: int


def has_length(loader: Any) -> bool:
    """A DataLoader always has __len__; over a stream it raises."""
    try:
        len(loader)
    except TypeError:
        return False
    return True


def rereadable(loader: Iterable[Any], name: str = "train") -> None:
    """Raise InvalidArgument for an iterator that gives its batches once: every stage reads them from the start."""
    if isinstance(loader, Iterator):
        raise InvalidArgument(
            f"{name} is an iterator that can be read once only, and its batches are read several times; give a list, a "
            "DataLoader, or an object whose __iter__ starts again"
        )


def first_batch(loader: Iterable[Any]) -> Any:
    """The first batch of a loader; InvalidArgument when there is none."""
    rereadable(loader, "the data")
    for batch in loader:
        return batch
    raise InvalidArgument("the data loader is empty")


def first_batches(loader: Iterable[Any], count: int, accelerator: Any, seed: int) -> list[Any]:
    """This process's first `count` batches on its device; InvalidArgument in all processes when one has none."""
    found = [to_device(batch, accelerator.device) for batch in islice(iter(own_share(loader, seed=seed)), count)]
    raise_together(None if found else InvalidArgument("the data loader is empty"))
    return found[: least(len(found))]  # as many in each, so that what is averaged weighs the same


def batches_per_epoch(loader: Iterable[Any], share: float = 1.0) -> int:
    """Batches of one epoch of the process that has most; InvalidArgument when all are empty or there is no length."""
    if not 0 < share <= 1:
        raise InvalidArgument(f"the share of the data is above 0 and at most 1, not {share}")
    if not has_length(loader):
        raise InvalidArgument("the loader has no length; give steps= for a stream")
    count = most(len(loader))  # type: ignore[arg-type]
    if count == 0:
        raise InvalidArgument("the data loader is empty")
    return math.ceil(count * share)


def prepared(loader: Iterable[Any], accelerator: Any) -> Iterable[Any]:
    """A loader whose batches are this process's own, shuffled by the accelerator's seed."""
    if isinstance(loader, torch.utils.data.DataLoader) and not (world()[1] > 1 and is_sharded(loader)):
        return accelerator.prepare(unshared(loader))  # type: ignore[no-any-return]
    return own_share(loader)


def set_epoch(loader: Any, epoch: int) -> None:
    """Tell a loader, or its sampler, or its data set which epoch the next pass is."""
    for part in (loader, getattr(loader, "sampler", None), getattr(loader, "dataset", None)):
        if hasattr(part, "set_epoch"):
            part.set_epoch(epoch)
            return


def feed(loader: Any, per_epoch: int, start: int, device: torch.device, hooks: Hooks) -> Iterator[Fed]:
    """Batches without end, from optimizer step `start` on; all processes take one at a time, together.

    hooks: Say how many samples a batch has, and how many items its loss is a mean over.
    A process whose part of an epoch is shorter than `per_epoch` takes an earlier batch again at weight zero. What goes
    wrong with one process's data is raised in all of them.
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
    """(epoch, index in epoch, batch, whether it is new)."""
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
            set_epoch(source, epoch)  # what is left of a loader begins at epoch 0 before Accelerate 1.15
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
            raise InvalidArgument("the data loader is empty" if alone else "this process has no batch of the data")
        # how often a stream began again before `start` shows only as it is read
        epoch, skip = epoch + 1, max(skip - seen, 0) if stream else 0
