"""JSON that has one spelling: written sorted and compact, read without duplicates, NaN or deep nesting."""

from __future__ import annotations

import json
import math
from typing import Any

from ..errors import InvalidArgument


def dump_json(value: Any, *, sort: bool = True) -> str:
    """Compact JSON; InvalidArgument for anything that JSON cannot say (NaN, objects, lone surrogates)."""
    try:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=sort, allow_nan=False)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidArgument(f"not JSON: {error}") from None
    return text


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"duplicate key {next(n for n in names if names.count(n) > 1)!r}")
    return out


def _constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is out of range")
    return value


def load_json(text: str | bytes, what: str) -> Any:
    """Parse JSON strictly; InvalidArgument, naming `what`, when it is anything else."""
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        return json.loads(text, object_pairs_hook=_pairs, parse_constant=_constant, parse_float=_float)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"{what} is no valid JSON: {error}") from None
