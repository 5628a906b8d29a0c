"""The types that the entries of a manifest's provenance must have, because readers rely on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..errors import InvalidArgument
from .canonical import dump_json

_Check = Callable[[Any], bool]


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and abs(value) < 2**63


def _figure(value: Any) -> bool:
    return _text(value) or _number(value)


def _object_of(check: _Check) -> _Check:
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


def _anything(value: Any) -> bool:
    return True


def _with(required: Mapping[str, _Check], optional: Mapping[str, _Check] | None = None) -> _Check:
    """An object with these keys, and possibly others."""

    def check(value: Any) -> bool:
        known = {**required, **(optional or {})}
        return (
            isinstance(value, dict)
            and required.keys() <= value.keys()
            and all(known[key](x) for key, x in value.items() if key in known)
        )

    return check


_FIGURES = _object_of(_figure)
_SETTING: _Check = lambda value: value is None or _figure(value)  # noqa: E731
_KNOWN: dict[str, tuple[_Check, str]] = {
    "hub_mpq": (_text, "a string"),
    "target": (_text, "a string"),
    "weights": (_text, "a string"),
    "task": (
        _with(
            {"name": _text},
            {
                "ignore_index": _SETTING,
                "output": _SETTING,
                "label_keys": lambda keys: isinstance(keys, list) and all(map(_text, keys)),
            },
        ),
        "the settings of a task",
    ),
    "metrics": (
        _object_of(lambda row: _FIGURES(row) and _text(row.get("task", "")) and _number(row.get("samples", 0))),
        "an object of figures (numbers or strings) by model and name",
    ),
    "search": (_object_of(_anything), "an object"),
    "finetune": (_object_of(_anything), "an object"),
    "latency": (
        _with(
            {
                **dict.fromkeys(("measured", "spread", "limit", "predicted", "batch_size", "threads"), _number),
                **dict.fromkeys(("runtime", "machine"), _text),
            }
        ),
        "the measurement of a latency",
    ),
    "runtimes": (
        _object_of(
            _with(
                {
                    **dict.fromkeys(("largest error", "codes one step off", "values wrong"), _number),
                    **dict.fromkeys(("exact", "integer layers", "float layers"), _number),
                    "machine": _text,
                    "metrics": _with({"runtime": _FIGURES, "reference": _FIGURES}),
                }
            )
        ),
        "the measurements of each runtime",
    ),
}


def check_provenance(provenance: Mapping[str, Any]) -> None:
    """Check the types of the known entries of a provenance; other entries may be anything.

    Raises:
        InvalidArgument: An entry has another type.
    """
    for key, (check, what) in _KNOWN.items():
        if key in provenance and not check(provenance[key]):
            raise InvalidArgument(f"provenance: {key} must be {what}, got {dump_json(provenance[key])[:60]}")
