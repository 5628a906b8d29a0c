"""The score and costs of a policy from the table's own numbers; integers are summed exactly."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import Any

from .table import ParsedTable

ROUNDING = 1e-12
"""Relative amount by which a sum of fractional costs may exceed its limit, for rounding; integers may not."""

Amounts = Mapping[str, float]


def total(values: Iterable[Any]) -> float:
    """The exact sum if all values have an integer type, else the correctly rounded one."""
    numbers = list(values)
    if all(isinstance(v, Integral) for v in numbers):
        return sum(int(v) for v in numbers)
    return math.fsum(float(v) for v in numbers)


def score(table: Mapping[str, Any], choices: Mapping[str, str]) -> float:
    """Sum of the chosen scores, correctly rounded."""
    return math.fsum(float(table["layers"][name][choice]["score"]) for name, choice in choices.items())


def usage(table: Mapping[str, Any], choices: Mapping[str, str], limits: Iterable[str]) -> dict[str, float]:
    """{limit: amount used}."""
    bags = [table["layers"][name][choice].get("cost") or {} for name, choice in choices.items()]
    return {limit: total(bag.get(limit, 0) for bag in bags) for limit in limits}


def over(used: Amounts, limits: Amounts) -> list[str]:
    """The limits that are exceeded."""
    return [k for k, cap in limits.items() if used[k] > (cap if isinstance(used[k], int) else cap * (1 + ROUNDING))]


def least(table: Mapping[str, Any], problem: ParsedTable) -> dict[str, float]:
    """{limit: minimum that any policy reaches}, each limit taken alone: the sum of each row's minimum cost."""
    layers, rows = table["layers"], list(zip(problem.names, problem.choices, strict=True))

    def cost(layer: str, choice: str, limit: str) -> Any:
        return (layers[layer][choice].get("cost") or {}).get(limit, 0)

    def cheapest(limit: str) -> Iterable[float]:
        return (min(total(cost(name, c, limit) for name in names) for c in choices) for names, choices in rows)

    return {limit: total(cheapest(limit)) for limit in problem.limits}
