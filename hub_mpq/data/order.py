"""The order of an epoch, which depends only on seed and epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Sampler


class Shuffled(Sampler[int]):
    """A sampler that shuffles anew each epoch, always the same for the same seed and epoch.

    It stays at epoch 0 until `set_epoch` is called.

    Args:
        length: Number of items.
        seed: Seed of the order.

    Example:
        >>> from hub_mpq.data import Shuffled
        >>> order = Shuffled(5, seed=1)
        >>> first = list(order)
        >>> order.set_epoch(1)
        >>> sorted(order), list(order) == first
        ([0, 1, 2, 3, 4], False)
    """

    def __init__(self, length: int, seed: int = 0) -> None:
        self.length, self.seed, self.epoch = length, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Select the epoch, as in torch's `DistributedSampler`.

        Args:
            epoch: The epoch, counted from 0.
        """
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return iter(torch.randperm(self.length, generator=generator).tolist())


class ShuffledEpochs(Shuffled):
    """The order of `Shuffled` as pairs `(epoch, index)`, which make the augmentation of `Images` reproducible.

    Args:
        length: Number of items.
        seed: Seed of the order.

    Example:
        >>> from hub_mpq.data import ShuffledEpochs
        >>> sorted(ShuffledEpochs(3))
        [(0, 0), (0, 1), (0, 2)]
    """

    def __iter__(self) -> Iterator[Any]:
        return ((self.epoch, index) for index in super().__iter__())
