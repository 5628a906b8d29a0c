"""A small part of a labelled data set, in batches of P classes times K samples."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset

from ..errors import InvalidArgument
from ..tasks import Classification
from ..tasks.batch import PLAIN_LABELS
from .train_val_split import drawn


class ClassSampler:
    """Sample batches of indices, with the same number of classes and of samples per class in each.

    The batches depend on the seed and the epoch. An epoch has enough batches for all samples once.

    Args:
        index: `{class: indices of its samples}`; a class with too few samples repeats them.
        classes: Number of classes in a batch.
        per_class: Number of samples of each class in a batch.
        seed: Seed of the sampling.
    """

    def __init__(self, index: dict[int, list[int]], classes: int, per_class: int, seed: int) -> None:
        self.index, self.classes, self.per_class = index, min(classes, len(index)), per_class
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(sum(map(len, self.index.values())) / (self.classes * self.per_class))

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        names = sorted(self.index)
        queues: dict[int, list[int]] = {name: [] for name in names}
        order: list[int] = []
        for _ in range(len(self)):
            batch: list[int] = []
            chosen: list[int] = []
            while len(chosen) < self.classes:
                if not order:
                    order = [names[i] for i in torch.randperm(len(names), generator=generator).tolist()]
                # the rest of a round may hold a class that is already in the batch
                fresh = next((name for name in order if name not in chosen), None)
                if fresh is None:
                    order = []
                    continue
                order.remove(fresh)
                chosen.append(fresh)
            for name in chosen:
                while len(queues[name]) < self.per_class:
                    mine = self.index[name]
                    queues[name] += [mine[i] for i in torch.randperm(len(mine), generator=generator).tolist()]
                batch += queues[name][: self.per_class]
                queues[name] = queues[name][self.per_class :]
            yield batch


KEYS = (*Classification.label_keys, *PLAIN_LABELS)
"""Keys of the class in a sample that is a dict."""


def labels_of_data(data: Any, indices: Sequence[int] | None = None) -> list[int]:
    """Return the class of every sample of a data set, from `targets`, `labels` or `tensors`, else by reading it.

    Args:
        data: The data set.
        indices: The samples; None for all.

    Raises:
        InvalidArgument: A sample has no label, or its label is not a single integer.
    """
    indices = range(len(data)) if indices is None else indices
    if isinstance(data, Subset):
        return labels_of_data(data.dataset, [data.indices[i] for i in indices])
    for name in ("targets", "labels"):
        found = getattr(data, name, None)
        if found is not None and not callable(found) and len(found) == len(data):
            return [_class_of(found[i]) for i in indices]
    tensors: Any = getattr(data, "tensors", ())
    if len(tensors) > 1:
        return [_class_of(tensors[1][i]) for i in indices]
    labels = []
    for i in indices:
        item = data[i]
        if isinstance(item, Mapping):
            label = next((item[key] for key in KEYS if item.get(key) is not None), None)
        else:
            label = item[1] if isinstance(item, (tuple, list)) and len(item) > 1 else None
        if label is None:
            raise InvalidArgument("a proxy needs labelled data, since it is drawn by class")
        labels.append(_class_of(label))
    return labels


def _class_of(label: Any) -> int:
    try:
        number = int(label)
        whole = number == label
    except (TypeError, ValueError, RuntimeError, OverflowError):
        whole = False
    if not whole:
        raise InvalidArgument(f"a proxy is drawn by class, so labels must be integers, got {str(label)[:60]}")
    return number


def class_loader(
    loader: Iterable[Any], share: float, classes: int | None, per_class: int, seed: int
) -> DataLoader[Any]:
    """Load a share of every class that a DataLoader draws, at least 2 samples, in batches of classes × per_class.

    Raises:
        InvalidArgument: The data set cannot be indexed, or the sampler has no length.
    """
    if not isinstance(loader, DataLoader) or not hasattr(loader.dataset, "__len__"):
        raise InvalidArgument("proxy as a share needs a DataLoader over a data set with a length; or pass a loader")
    chosen = drawn(loader)
    if not chosen:
        missing = "no length" if chosen is None else "no samples"
        raise InvalidArgument(f"proxy as a share needs a sampler of samples, and the loader's has {missing}")
    index: dict[int, list[int]] = {}
    for i, label in zip(chosen, labels_of_data(loader.dataset, chosen), strict=True):
        if label != Classification().ignore_index:
            index.setdefault(label, []).append(i)
    generator = torch.Generator().manual_seed(seed)
    for label, mine in index.items():
        kept = max(round(share * len(mine)), min(2, len(mine)))
        index[label] = [mine[i] for i in torch.randperm(len(mine), generator=generator)[:kept].tolist()]
    size = loader.batch_size or 4 * per_class
    sampler = ClassSampler(index, classes or max(size // per_class, 1), per_class, seed)
    return DataLoader(
        loader.dataset,
        batch_sampler=sampler,  # type: ignore[arg-type]
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
    )


def labels_in(labels: Iterable[Any]) -> int:
    """Return the largest label of all batches, or −1 if there are none."""
    return max((int(y.max()) for y in labels if y is not None and y.numel()), default=-1)
