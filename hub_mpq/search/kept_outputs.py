"""Outputs of the float model on held-out batches, on disk, so that each policy is compared with the same ones."""

from __future__ import annotations

import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch

from ..tasks.outputs import tensors_in

LIMIT = 1 << 32
"""Bytes that are kept at most. What is beyond has to be computed again."""


class KeptOutputs:
    """Outputs by batch, in a temporary folder that goes with the object: logits over a large vocabulary outgrow the
    model that they are of, and only one batch's are in memory at a time."""

    def __init__(self) -> None:
        self._files: dict[int, tuple[Any, Path]] = {}  # by the batch's identity, which lasts as long as the batch
        self._left = LIMIT
        self._folder: Path | None = None

    def add(self, batch: Any, output: Any) -> None:
        """Keep what a batch gave, unless it does not fit, or can't be pickled.

        Args:
            batch: The batch; it is held too.
            output: Any output that `torch.save` takes.
        """
        size = sum(x.numel() * x.element_size() for x in tensors_in(output).values())
        if size > self._left:
            return
        if self._folder is None:
            holder = tempfile.TemporaryDirectory(prefix="hub-mpq-outputs-")
            weakref.finalize(self, holder.cleanup)
            self._folder = Path(holder.name)
        file = self._folder / str(len(self._files))
        try:
            torch.save(output, file)
        except Exception:  # a full disk, a class that can't be pickled: it is computed again
            file.unlink(missing_ok=True)
            self._left = 0
            return
        self._files[id(batch)] = batch, file
        self._left -= size

    def get(self, batch: Any) -> Any:
        """The output of a batch, to the bit; None where it was not kept."""
        if id(batch) not in self._files:
            return None
        return torch.load(self._files[id(batch)][1], mmap=True, weights_only=False)
