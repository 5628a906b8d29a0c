"""Outputs of the float model on held-out batches, kept on disk for the comparison with each policy."""

from __future__ import annotations

import tempfile
import weakref
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

LIMIT = 1 << 32
"""Maximum number of bytes that are kept; further outputs are computed again."""


class _File(NamedTuple):
    """A tensor on disk, with the bytes that it had in memory."""

    path: Path
    dtype: torch.dtype
    shape: torch.Size
    device: torch.device

    def tensor(self) -> Tensor:
        """Memory-map the tensor; its bytes are read on access."""
        flat = torch.from_file(str(self.path), shared=False, size=self.shape.numel(), dtype=self.dtype)
        return flat.view(self.shape).to(self.device)


class KeptOutputs:
    """Outputs by batch, in a temporary folder that is removed with the object.

    Logits over a large vocabulary can exceed the size of the model, so only those of one batch are in memory at a time.
    """

    def __init__(self) -> None:
        self._kept: dict[int, tuple[Any, list[Any], TreeSpec]] = {}  # by id; the batch keeps it valid
        self._left, self._count = LIMIT, 0
        self._folder: Path | None = None

    def add(self, batch: Any, output: Any) -> None:
        """Keep the output of a batch, if it fits and holds only tensors, numbers and strings.

        Args:
            batch: The batch, which is kept as well.
            output: Tensors, also in tuples, lists, dicts and transformers' outputs.
        """
        leaves, form = tree_flatten(output)
        size = sum(leaf.numel() * leaf.element_size() for leaf in leaves if isinstance(leaf, Tensor))
        known = all(leaf is None or isinstance(leaf, (Tensor, int, float, str)) for leaf in leaves)
        if size > self._left or not known:
            return
        try:
            self._kept[id(batch)] = batch, [self._written(leaf) for leaf in leaves], form
        except OSError:  # the disk is full: the output is computed again
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
        """Return the output of a batch, bit for bit; None if it was not kept."""
        if id(batch) not in self._kept:
            return None
        _, leaves, form = self._kept[id(batch)]
        return tree_unflatten([leaf.tensor() if isinstance(leaf, _File) else leaf for leaf in leaves], form)
