"""A small part of a labelled data set, in batches of P classes times K samples."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset

from ..errors import InvalidArgument
from ..train.batch import labels_of


class ClassSampler:
    """Batches of indices: `classes` classes times `per_class` samples of each; the same for a seed and an epoch.

    index: {class: indices}. A class of fewer samples repeats them.
    An epoch has as many batches as hold all samples once.
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
                # the rest of one round may hold a class that the batch has already
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


def labels_of_data(data: Any) -> list[int]:
    """Class of every sample of a data set: from `targets`, `labels` or `tensors`, else by reading them all."""
    if isinstance(data, Subset):
        inner = labels_of_data(data.dataset)
        return [inner[i] for i in data.indices]
    for name in ("targets", "labels"):
        found = getattr(data, name, None)
        if found is not None and not callable(found) and len(found) == len(data):
            return [int(y) for y in found]
    tensors: Any = getattr(data, "tensors", ())
    if len(tensors) > 1:
        return [int(y) for y in tensors[1]]
    labels = []
    for i in range(len(data)):
        item = data[i]
        label = item.get("labels", item.get("label")) if isinstance(item, dict) else item[1] if len(item) > 1 else None
        if label is None:
            raise InvalidArgument("the data have no labels, and a proxy is drawn by class")
        labels.append(int(label))
    return labels


def class_loader(
    loader: Iterable[Any], share: float, classes: int | None, per_class: int, seed: int
) -> DataLoader[Any]:
    """`share` of every class of a DataLoader's data set (at least 2 samples), in batches of classes × per_class.

    Raises InvalidArgument for a loader whose data set cannot be indexed.
    """
    if not isinstance(loader, DataLoader) or not hasattr(loader.dataset, "__len__"):
        raise InvalidArgument("a share of the data needs a DataLoader over a data set with a length; or give a loader")
    index: dict[int, list[int]] = {}
    for i, label in enumerate(labels_of_data(loader.dataset)):
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
    )


def labels_in(batches: Iterable[Any]) -> int:
    """The greatest label in a loader, −1 when there are none."""
    return max((int(y.max()) for y in map(labels_of, batches) if y is not None and y.numel()), default=-1)
