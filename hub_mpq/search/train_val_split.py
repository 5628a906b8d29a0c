"""Pairs of training and held-out batches from one loader, for strategies that train on two splits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, SequentialSampler, Subset
from torch.utils.data.dataloader import default_collate

from ..errors import InvalidArgument
from ..tasks import Pair
from ..train.batches import has_length


def drawn(loader: DataLoader[Any]) -> list[int] | None:
    """Return the sorted indices of the samples that a DataLoader reads; None if its sampler has no length.

    If the sampler chooses other samples in every epoch, these are the samples of one epoch. Repetitions are omitted.
    """
    if loader.batch_size is None and loader.batch_sampler is not None:
        sampler: Any = loader.batch_sampler
        return (
            sorted({int(i) for batch in islice(sampler, len(sampler)) for i in batch}) if has_length(sampler) else None
        )
    sampler = loader.sampler
    if type(sampler) in (SequentialSampler, RandomSampler):
        return list(range(len(sampler.data_source)))
    return sorted({int(i) for i in islice(sampler, len(sampler))}) if has_length(sampler) else None


class PairDataset(Dataset[Any]):
    """A data set split into two halves by a seed; each item is a training sample and a held-out sample."""

    def __init__(self, data: Any, seed: int) -> None:
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist()
        self.data, self.length = data, len(data) // 2
        self.train, self.held = order[: self.length], order[self.length : 2 * self.length]
        if not self.length:
            raise InvalidArgument("splitting into training and held-out data needs at least 2 samples")

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.data[self.train[index]], self.data[self.held[index]]

    def __getitems__(self, indices: list[int]) -> list[tuple[Any, Any]]:
        if not hasattr(self.data, "__getitems__"):
            return [self[i] for i in indices]
        rows = [self.data.__getitems__([split[i] for i in indices]) for split in (self.train, self.held)]
        return list(zip(*rows, strict=True))


class _PairCollate:
    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, items: list[tuple[Any, Any]]) -> Pair:
        return Pair(self.collate([item[0] for item in items]), self.collate([item[1] for item in items]))


class SplitBatches:
    """Cut each batch of a loader in two, for loaders other than DataLoader; the halves of a fixed list stay separate.

    If the last batch is a single sample, it is used for training, and the previous held-out half is repeated.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader
        if hasattr(loader, "set_epoch"):
            self.set_epoch = loader.set_epoch

    def __iter__(self) -> Iterator[Pair]:
        held: Any = None
        for batch in self.loader:
            try:
                train, held = cut(batch, 0), cut(batch, 1)
            except InvalidArgument:
                if held is None:
                    raise
                train = batch
            yield Pair(train, held)

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]


def cut(batch: Any, part: int) -> Any:
    """Return half of a batch: of tensors, arrays, and lists with one entry per sample, such as detection labels."""
    if isinstance(batch, Mapping):
        return {k: cut(v, part) for k, v in batch.items()}
    if isinstance(batch, (tuple, list)) and any(isinstance(v, (Tensor, np.ndarray, tuple)) for v in batch):
        return tuple(cut(v, part) for v in batch)
    if not isinstance(batch, (Tensor, np.ndarray, list)) or getattr(batch, "ndim", 1) == 0:
        return batch
    if len(batch) < 2:
        raise InvalidArgument("splitting into training and held-out data needs batches of at least 2 samples")
    middle = len(batch) // 2
    return batch[middle:] if part else batch[:middle]


def train_val_split(loader: Iterable[Any], seed: int) -> Iterable[Any]:
    """Make a loader of (train, held-out) batches of half the size, with the same number of steps in an epoch.

    The samples of a DataLoader are split once into two halves that never mix. For other loaders, and samplers without a
    length, each batch is cut in two. A last half of a single sample is omitted, because norms cannot train on it.
    """
    if not isinstance(loader, DataLoader) or loader.batch_size is None or not hasattr(loader.dataset, "__len__"):
        return SplitBatches(loader)
    indices = drawn(loader)
    if indices is None:
        return SplitBatches(loader)
    whole = len(indices) == len(loader.dataset)
    data = PairDataset(loader.dataset if whole else Subset(loader.dataset, indices), seed)
    size = max(loader.batch_size // 2, 1)
    shuffled = not isinstance(loader.sampler, SequentialSampler)
    return DataLoader(
        data,
        batch_size=size,
        shuffle=shuffled,
        generator=torch.Generator().manual_seed(seed) if shuffled else None,
        collate_fn=_PairCollate(loader.collate_fn or default_collate),
        num_workers=loader.num_workers,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        drop_last=loader.drop_last or (len(data) > size > 1 and len(data) % size == 1),
        pin_memory=loader.pin_memory,
    )
