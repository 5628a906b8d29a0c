"""Tensors that were cut from one, put together again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Parts one behind the other along the first axis: of such that still lie so in memory a view, else a copy.

    Args:
        parts: Tensors of the same sizes but the first.
    """
    first, offset = parts[0], parts[0].storage_offset()
    for part in parts:
        same = part.untyped_storage()._cdata == first.untyped_storage()._cdata and part.dtype == first.dtype
        if not same or part.storage_offset() != offset or not part.is_contiguous():
            return torch.cat(list(parts))
        offset += part.numel()
    return first.as_strided((sum(len(part) for part in parts), *first.shape[1:]), first.stride())
