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


KEYS = (*Classification.label_keys, *PLAIN_LABELS)
"""Where a sample that is a dict has its class."""


def labels_of_data(data: Any, indices: Sequence[int] | None = None) -> list[int]:
    """Class of every sample of a data set, or of those named: from `targets`, `labels` or `tensors`, else by reading
    them. Raises InvalidArgument for labels that are no single whole number."""
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
            raise InvalidArgument("the data have no labels, and a proxy is drawn by class")
        labels.append(_class_of(label))
    return labels


def _class_of(label: Any) -> int:
    try:
        number = int(label)
        whole = number == label
    except (TypeError, ValueError, RuntimeError, OverflowError):
        whole = False
    if not whole:
        raise InvalidArgument(f"a proxy is drawn by class, and this label is no whole number: {str(label)[:60]}")
    return number


def class_loader(
    loader: Iterable[Any], share: float, classes: int | None, per_class: int, seed: int
) -> DataLoader[Any]:
    """`share` of every class of what a DataLoader draws (at least 2 samples), in batches of classes × per_class.

    Raises InvalidArgument for a loader whose data set cannot be indexed or whose sampler has no length.
    """
    if not isinstance(loader, DataLoader) or not hasattr(loader.dataset, "__len__"):
        raise InvalidArgument("a share of the data needs a DataLoader over a data set with a length; or give a loader")
    chosen = drawn(loader)
    if not chosen:
        missing = "has no length" if chosen is None else "draws nothing"
        raise InvalidArgument(f"a share of the data is taken of what the sampler draws, and the loader's {missing}")
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
    """The greatest of the labels of all batches, −1 when there are none."""
    return max((int(y.max()) for y in labels if y is not None and y.numel()), default=-1)
