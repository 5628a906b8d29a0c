"""Outputs of the float model on held-out batches, on disk, so that each policy is compared with the same ones."""

from __future__ import annotations

import tempfile
import weakref
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

LIMIT = 1 << 32
"""Bytes that are kept at most. What is beyond has to be computed again."""


class _File(NamedTuple):
    """A tensor that is on disk, its bytes as they lay in memory."""

    path: Path
    dtype: torch.dtype
    shape: torch.Size
    device: torch.device

    def tensor(self) -> Tensor:
        """The tensor, mapped: its bytes are read where they are looked at."""
        flat = torch.from_file(str(self.path), shared=False, size=self.shape.numel(), dtype=self.dtype)
        return flat.view(self.shape).to(self.device)


class KeptOutputs:
    """Outputs by batch, in a temporary folder that goes with the object: logits over a large vocabulary outgrow the
    model that they are of, and only one batch's are in memory at a time."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[Any, list[Any], TreeSpec]] = {}  # by the batch's identity, and the batch to keep it
        self._left, self._count = LIMIT, 0
        self._folder: Path | None = None

    def add(self, batch: Any, output: Any) -> None:
        """Keep what a batch gave, unless it does not fit, or holds objects that are no tensors, numbers or texts.

        Args:
            batch: The batch; it is held too.
            output: Tensors, alone or in tuples, lists, dicts and outputs of transformers.
        """
        leaves, form = tree_flatten(output)
        size = sum(leaf.numel() * leaf.element_size() for leaf in leaves if isinstance(leaf, Tensor))
        known = all(leaf is None or isinstance(leaf, (Tensor, int, float, str)) for leaf in leaves)
        if size > self._left or not known:
            return
        try:
            self._kept[id(batch)] = batch, [self._written(leaf) for leaf in leaves], form
        except OSError:  # a full disk: it is computed again
            size = self._left
        self._left -= size

    def _written(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.numel():
            return leaf
        if self._folder is None:
            holder = tempfile.TemporaryDirectory(prefix="hub-mpq-outputs-")
            weakref.finalize(self, holder.cleanup)
            self._folder = Path(holder.name)
        file = _File(self._folder / str(self._count), leaf.dtype, leaf.shape, leaf.device)
        self._count += 1
        leaf.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tofile(file.path)
        return file

    def get(self, batch: Any) -> Any:
        """The output of a batch, to the bit; None where it was not kept."""
        if id(batch) not in self._kept:
            return None
        _, leaves, form = self._kept[id(batch)]
        return tree_unflatten([leaf.tensor() if isinstance(leaf, _File) else leaf for leaf in leaves], form)
