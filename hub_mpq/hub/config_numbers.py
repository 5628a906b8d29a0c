"""Checks of the numbers in a config.json, before a library uses them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import PackedFormat, shown
from ..pack import PackedTensor

MOST = 100_000
"""Counts that need no tensor of that size are allowed up to this: configs create lists of layers and labels at once."""
_SIZES = re.compile(
    r"vocab|position|length|theta|window|size|dim|token|_id$|seed|base|max|rate|freq|hop|scal|_k$|bytes|context|seq"
)
"""Names of numbers that are not counts: sizes of tensors, which cost nothing until allocated, ids, frequencies."""


def check_numbers(config: Path, tensors: Mapping[str, PackedTensor | Tensor]) -> None:
    """Refuse a config.json with a NaN, or with a count that exceeds every axis of the packed file's tensors.

    Args:
        config: The file.
        tensors: Tensors of the packed file, as `read_shapes` returns them.

    Raises:
        PackedFormat: There is such a number, or the file is not valid JSON.
    """
    try:
        tree = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PackedFormat(config, f"cannot be read: {error}") from None
    shapes = (t.weight_shape if isinstance(t, PackedTensor) else tuple(t.shape) for t in tensors.values())
    most = max([MOST, *(n for shape in shapes for n in shape)])
    for name, value in _numbers(tree):
        if isinstance(value, float) and math.isnan(value):
            raise PackedFormat(config, f"{shown(name, 80)} is NaN")
        if isinstance(value, int) and value > most and not _SIZES.search(name):
            raise PackedFormat(
                config,
                f"{shown(name, 80)} is {shown(value, 20)}, but the packed file does not hold a network of that size",
            )


def _numbers(tree: Any) -> list[tuple[str, int | float]]:
    """(key, number) of every number in JSON values; those in a list have the list's key."""
    found: list[tuple[str, int | float]] = []
    level = [("", tree)]
    while level:
        found += [(k, v) for k, v in level if isinstance(v, (int, float)) and not isinstance(v, bool)]
        level = [
            pair
            for key, v in level
            if isinstance(v, (dict, list))
            for pair in (v.items() if isinstance(v, dict) else ((key, x) for x in v))
        ]
    return found
