"""Parsing of the public table of scores and costs into arrays, with tied layers merged into one row."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidArgument

Floats = NDArray[np.float64]
MAX_NUMBERS = 200_000_000
"""Maximum number of scores and costs as arrays, with all rows as long as the longest one: 1.6 GB."""
MAX_SUM = 1e305
"""Scores, and costs under one limit, that could add up to more are rejected, since sums would overflow."""
_INFINITE = (math.inf, -math.inf)


@dataclass(frozen=True)
class ParsedTable:
    """A table as arrays: n rows (a layer, or tied layers) of up to k choices, and m limits.

    `score` (n, k): always to be minimised; +inf pads rows with fewer choices. `cost`: (m, n, k). `caps` (m,): may be
    inf. `names[i]`: the layers of row i. `choices[i]`: its choices.
    """

    maximise: bool
    names: list[tuple[str, ...]]
    choices: list[list[str]]
    limits: dict[str, float]
    score: Floats
    cost: Floats
    caps: Floats

    def policy(self, picks: Sequence[int] | NDArray[np.intp]) -> dict[str, str]:
        """{layer: choice} from one pick per row."""
        rows = zip(self.names, self.choices, picks, strict=True)
        return {name: choices[pick] for names, choices, pick in rows for name in names}


def parse(table: Mapping[str, Any]) -> ParsedTable:
    """Validate the argument of `solve_table` and parse it; InvalidArgument names the invalid layer."""
    if not isinstance(table, Mapping):
        raise InvalidArgument(f"the table must be a mapping with sense, layers and limits, got {type(table).__name__}")
    if table.get("sense") not in ("min", "max"):
        raise InvalidArgument(f'sense must be "min" or "max", got {table.get("sense")!r}')
    layers = table.get("layers")
    if not isinstance(layers, Mapping) or not layers:
        raise InvalidArgument("layers must be a mapping with at least one layer {choice: {score, cost}}")
    limits = _limits(table.get("limits", {}))
    starts, score, costs = _flatten(layers, list(limits))
    groups = _groups(layers, table.get("ties", ()))

    names = [tuple(group) for group in groups]
    choices = [_common(group, layers) for group in groups]
    flat = np.vstack([score if table["sense"] == "min" else -score, costs])
    counts = np.array([len(row) for row in choices])
    shape = len(flat), len(choices), int(counts.max())
    if math.prod(shape) > MAX_NUMBERS:
        raise InvalidArgument(
            f"the table is too large: {shape[1]} rows of up to {shape[2]} choices and {shape[0] - 1} limits; "
            f"rows × choices × (1 + limits) must be at most {MAX_NUMBERS:,}"
        )
    out = np.zeros(shape)
    out[0] = np.inf
    for i, group in enumerate(names):
        start = starts[group[0]]
        if len(group) == 1:
            out[:, i, : counts[i]] = flat[:, start : start + counts[i]]
            continue
        out[0, i, : counts[i]] = 0.0
        for name in group:
            place = {c: starts[name] + j for j, c in enumerate(layers[name])}
            out[:, i, : counts[i]] += flat[:, [place[c] for c in choices[i]]]
    caps = np.array([min(cap, MAX_SUM) for cap in limits.values()], dtype=float)
    return ParsedTable(table["sense"] == "max", names, choices, limits, out[0], out[1:], caps)


def _limits(limits: Any) -> dict[str, float]:
    if not isinstance(limits, Mapping):
        raise InvalidArgument(f"limits must be a mapping {{name: amount}}, got {limits!r}")
    for name, cap in limits.items():
        if isinstance(cap, bool) or not isinstance(cap, Real) or cap != cap or cap < 0:
            raise InvalidArgument(f"limit {name!r} must be a non-negative number, got {cap!r}")
    small = {name: cap if cap <= MAX_SUM else math.inf for name, cap in limits.items()}
    return {name: int(cap) if isinstance(cap, Integral) else float(cap) for name, cap in small.items()}


def _flatten(layers: Mapping[str, Any], limits: list[str]) -> tuple[dict[str, int], Floats, Floats]:
    """All choices of all layers, concatenated: the start of each layer, scores (N,), costs (m, N)."""
    starts: dict[str, int] = {}
    rows: list[Mapping[str, Any]] = []
    for name, choices in layers.items():
        if not isinstance(choices, Mapping) or not choices:
            raise InvalidArgument(f"layer {name!r} has no choices; give at least one {{choice: {{score, cost}}}}")
        starts[name] = len(rows)
        rows.extend(choices.values())
    try:
        score = _numbers([row["score"] for row in rows])
        bags = [row.get("cost") or {} for row in rows]
        costs = [_numbers([bag.get(limit, 0) for bag in bags]) for limit in limits]
    except (TypeError, KeyError, AttributeError, OverflowError):
        score, costs = np.array([np.nan]), []  # the slow check below finds where
    everything = np.vstack([score, *costs]) if costs else score[None]
    if not np.isfinite(everything).all() or (everything[1:] < 0).any():
        _complain(layers, limits)
    for what, values in zip(["scores", *(f"costs {limit!r}" for limit in limits)], everything, strict=True):
        if np.abs(values).max() > MAX_SUM / len(values):
            raise InvalidArgument(f"{what} could add up to more than {MAX_SUM:g}; divide them by a common factor")
    return starts, score, everything[1:]


def _numbers(values: list[Any]) -> Floats:
    if not set(map(type, values)) <= {int, float} and not all(map(_is_number, values)):
        raise TypeError("not a number")
    return np.array(values, dtype=np.float64)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and value == value and value not in _INFINITE


def _complain(layers: Mapping[str, Any], limits: list[str]) -> None:
    for name, choices in layers.items():
        for choice, row in choices.items():
            where = f"layer {name!r}, choice {choice!r}"
            if not isinstance(row, Mapping) or not isinstance(row.get("cost") or {}, Mapping):
                raise InvalidArgument(f"{where}: expected {{score: number, cost: {{limit: number}}}}, got {row!r}")
            if not _is_number(row.get("score")):
                raise InvalidArgument(f"{where}: score must be a finite number, got {row.get('score')!r}")
            for limit in limits:
                cost = (row.get("cost") or {}).get(limit, 0)
                if not _is_number(cost) or cost < 0:
                    raise InvalidArgument(f"{where}: cost {limit!r} must be finite and non-negative, got {cost!r}")
    raise InvalidArgument("the table holds a number that is too large for a float")


def _groups(layers: Mapping[str, Any], ties: Any) -> list[list[str]]:
    """Groups of layers that take the same choice, in the order of the table; ties that share a layer are merged."""
    if ties is not None and (isinstance(ties, (str, bytes, Mapping)) or not isinstance(ties, Iterable)):
        raise InvalidArgument(f"ties must be a list of lists of layer names, got {ties!r}")
    parent = {name: name for name in layers}

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for tie in ties or ():
        if isinstance(tie, (str, bytes)) or not isinstance(tie, Sequence):
            raise InvalidArgument(f"a tie must be a list of layer names, got {tie!r}")
        for name in tie:
            if not isinstance(name, Hashable) or name not in parent:
                raise InvalidArgument(f"tie {list(tie)!r} names unknown layer {name!r}")
            parent[root(name)] = root(tie[0])
    group: dict[str, list[str]] = {}
    for name in layers:
        group.setdefault(root(name), []).append(name)
    return list(group.values())


def _common(group: list[str], layers: Mapping[str, Any]) -> list[str]:
    choices = list(layers[group[0]])
    for name in group[1:]:
        choices = [c for c in choices if c in layers[name]]
    if not choices:
        others = f" and {len(group) - 5} others" if len(group) > 5 else ""
        raise InvalidArgument(f"tied layers {group[:5]!r}{others} have no choice in common")
    return choices
