"""Canonical JSON: written sorted and compact, read without duplicate keys, NaN or deep nesting."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

from ..errors import InvalidArgument

MAX_DEPTH = 64
"""Maximum number of objects and lists around a value; hub_mpq's own files have six."""
_TOO_DEEP = f"{{}} is not valid JSON: nested more than {MAX_DEPTH} levels deep"


def dump_json(value: Any, *, sort: bool = True) -> str:
    """Compact JSON; raises InvalidArgument for what JSON cannot represent (NaN, objects, lone surrogates)."""
    try:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=sort, allow_nan=False)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidArgument(f"cannot convert to JSON: {error}") from None
    return text


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"duplicate key {name[:80]!r}")
    return out


def _constant(text: str) -> Any:
    raise ValueError(f"{text} is not allowed")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is out of range")
    return value


def load_json(text: str | bytes, what: str) -> Any:
    """Parse JSON strictly; raises InvalidArgument, which names `what`, for anything else."""
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        tree = json.loads(text, object_pairs_hook=_pairs, parse_constant=_constant, parse_float=_float)
    except RecursionError:
        raise InvalidArgument(_TOO_DEEP.format(what)) from None
    except ValueError as error:
        raise InvalidArgument(f"{what} is not valid JSON: {error}") from None
    _check_depth(tree, what)
    return tree


def _check_depth(tree: Any, what: str) -> None:
    """Raise InvalidArgument for more than MAX_DEPTH levels, since the code that reads them may recurse."""
    level = [tree]
    for _ in range(MAX_DEPTH + 1):
        level = [x for v in level if isinstance(v, (dict, list)) for x in (v.values() if isinstance(v, dict) else v)]
        if not level:
            return
    raise InvalidArgument(_TOO_DEEP.format(what))
