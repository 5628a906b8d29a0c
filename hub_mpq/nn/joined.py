"""Concatenate tensors that were split from one tensor, without a copy if possible."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate along the first axis: a view if the parts are still adjacent in memory, else a copy.

    Args:
        parts: Tensors whose shapes differ only in the first axis.
    """
    first, offset = parts[0], parts[0].storage_offset()
    for part in parts:
        same = part.untyped_storage()._cdata == first.untyped_storage()._cdata and part.dtype == first.dtype
        if not same or part.storage_offset() != offset or not part.is_contiguous():
            return torch.cat(list(parts))
        offset += part.numel()
    return first.as_strided((sum(len(part) for part in parts), *first.shape[1:]), first.stride())
