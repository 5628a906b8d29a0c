"""Budgets: the limits on a policy."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from ..errors import InvalidArgument
from .bits import LayerBits
from .checks import is_finite
from .latency import LatencyTable, read_latency_table
from .limit import RESERVED, Value, limits

Cost = tuple[float, Mapping[str, Mapping[str, float]]] | tuple[float, Mapping[str, Mapping[str, float]], float]
Costs = Mapping[str, Cost]

NO_TABLE = (
    "latency= (--latency) needs a table of this model's layer times on a runtime: measure it with "
    "`hub-mpq bench MODEL --runtime R -o table.json`, then pass latency_table='table.json' (--latency-table table.json)"
)


@dataclass(frozen=True, init=False)
class Budget:
    """Limits on a policy. Combine them freely; all must be met.

    A limit is an absolute amount or, where noted below, a level such as "W4A4", which applies to the searched layers
    only. Strings need a unit ("5.7MB"); numbers are in the limit's own unit.

    Args:
        bitops: BitOps of the whole model for one sample, with float work counted at 32×32 bits ("34.7G"), or a level
            ("W4A4").
        size: Bytes of the packed file, including its header ("5.7MB"), or a level ("W4").
        compression: Minimum ratio of the float32 size of all quantized layers' weights to their packed size ("12.2").
        weight_bits: Mean bit-width of the searched layers' weights, each weight counted once.
        activation_memory: Total bytes of all quantized inputs of one sample ("200KB"), or a level ("A4").
        activation_peak: Bytes of the largest quantized input of one sample ("50KB"), or a level ("A4").
        latency: Seconds of one call ("5ms") on the machine, runtime, batch size and threads of `latency_table`.
        latency_table: The layer times measured by `HubMPQ.measure_latency` or `hub-mpq bench`: a table or its file.
        costs: Custom costs such as measured milliseconds: {name: (maximum, {layer: {"W4A4": cost}})}. An optional third
            item, (maximum, table, constant), is the cost of everything but the layers, which counts too.
        **others: Limits added by `register_limit`, by name.

    Attributes:
        given: {limit: the value as passed}.
        limits: {limit: the parsed amount or level}.

    Raises:
        InvalidArgument: No limit is given, a limit is unknown or cannot be parsed, or `latency` comes without a table.

    Example:
        >>> from hub_mpq import Budget
        >>> budget = Budget(bitops="W4A4", size="5.7MB")
        >>> print(budget, budget.limits["size"])
        bitops W4A4, size 5.7MB 5700000.0
    """

    given: Mapping[str, str | float]
    """The limits as passed."""
    limits: Mapping[str, Value]
    """{name: the parsed amount or level}."""
    latency_table: LatencyTable | None
    costs: Costs

    def __init__(
        self,
        *,
        bitops: str | float | None = None,
        size: str | float | None = None,
        compression: str | float | None = None,
        weight_bits: str | float | None = None,
        activation_memory: str | float | None = None,
        activation_peak: str | float | None = None,
        latency: str | float | None = None,
        latency_table: LatencyTable | str | os.PathLike[str] | None = None,
        costs: Costs | None = None,
        **others: str | float | None,
    ) -> None:
        own = {"bitops": bitops, "size": size, "compression": compression, "weight_bits": weight_bits}
        own |= {"activation_memory": activation_memory, "activation_peak": activation_peak}
        own |= {"latency": latency}
        given = {name: value for name, value in (own | others).items() if value is not None}
        for name in others:
            if name not in limits:
                near = difflib.get_close_matches(name, [*limits.names(), *sorted(RESERVED)], n=1, cutoff=0.8)
                hint = f"; did you mean {near[0]!r}?" if near else f"; limits: {', '.join(limits.names())}, costs"
                raise InvalidArgument(f"unknown option or limit {name!r}{hint}")
        if latency is not None and latency_table is None:
            raise InvalidArgument(NO_TABLE)
        if not given and not costs and latency_table is None:
            raise InvalidArgument('no budget given: set at least one limit, such as bitops="W4A4" (--bitops W4A4)')
        if clash := sorted(set(costs or ()) & set(limits.names())):
            raise InvalidArgument(f"cost {clash[0]!r} has the name of a limit; rename it")
        for name, cost in (costs or {}).items():
            if not _is_cost(cost):
                raise InvalidArgument(
                    f'cost {name!r} must be (maximum, {{layer: {{"W4A4": cost}}}}), got {str(cost)[:60]}'
                )
        if isinstance(latency_table, (str, os.PathLike)):
            latency_table = read_latency_table(latency_table)
        if latency_table is not None and not isinstance(latency_table, LatencyTable):
            raise InvalidArgument(f"latency_table must be a LatencyTable or its file, got {str(latency_table)[:60]}")
        parsed = {name: limits.get(name).parse(value) for name, value in given.items()}
        object.__setattr__(self, "given", MappingProxyType(given))
        object.__setattr__(self, "limits", MappingProxyType(parsed))
        object.__setattr__(self, "latency_table", latency_table)
        object.__setattr__(self, "costs", MappingProxyType(dict(costs or {})))

    @classmethod
    def of(cls, budget: Budget | Mapping[str, Any] | None, named: Mapping[str, Any]) -> Budget | None:
        """Merge a budget and limits given as keywords.

        Args:
            budget: A Budget, a mapping of limits, or None.
            named: Limits given as keywords; they replace those of `budget`.

        Returns:
            The merged budget; None if there is no limit at all.

        Raises:
            InvalidArgument: As for `Budget`.
        """
        if budget is not None and not isinstance(budget, (cls, Mapping)):
            raise InvalidArgument(f"budget must be a Budget or a mapping of limits, got {budget!r}")
        if isinstance(budget, cls) and not named:
            return budget
        own = {**budget.given, **budget.tables} if isinstance(budget, Budget) else dict(budget or {})
        whole = {**own, **named}
        known = {*limits.names(), "costs", "latency_table"}
        if set(whole) <= known and all(value is None or value == {} for value in whole.values()):
            return None
        return cls(**whole)

    def replaced(self, name: str, value: str | float) -> Budget:
        """Return the same budget with one limit set to another value.

        Args:
            name: The limit.
            value: Its new value, as for `Budget`.

        Returns:
            The new budget.
        """
        return type(self)(**{**self.given, **self.tables, name: value})

    @property
    def tables(self) -> dict[str, Any]:
        """The arguments that are not limits: {"costs": ..., "latency_table": ...}."""
        return {"costs": self.costs, "latency_table": self.latency_table}

    def with_groups(self, group_size: int | None, symmetric: bool = True) -> Budget:
        """Return the same budget with a group size and symmetry in levels that do not specify them.

        Args:
            group_size: The group size, see `LayerBits`.
            symmetric: False for zero points.

        Returns:
            The new budget.
        """
        given: dict[str, Any] = dict(self.given)
        for name, value in self.limits.items():
            if isinstance(value, LayerBits) and not value.grouped:
                level = value.with_groups(group_size, symmetric)
                given[name] = given[name] if level == value else str(level)
        return type(self)(**given, **self.tables)

    def __reduce__(self) -> tuple[Any, ...]:
        # a read-only mapping cannot be copied or pickled
        return _made, (dict(self.given), {**self.tables, "costs": dict(self.costs)})

    def __str__(self) -> str:
        return ", ".join([f"{name} {value}" for name, value in self.given.items()] + list(self.costs))


def _made(given: Mapping[str, Any], tables: Mapping[str, Any]) -> Budget:
    return Budget(**given, **tables)


def _is_cost(value: object) -> bool:
    """Whether a value is (maximum, table of costs) or (maximum, table of costs, constant)."""
    if not isinstance(value, (tuple, list)) or len(value) not in (2, 3):
        return False
    cap, table, *constant = value
    if not isinstance(table, Mapping) or not all(isinstance(row, Mapping) for row in table.values()):
        return False
    return all(map(is_finite, (cap, *constant, *(cost for row in table.values() for cost in row.values()))))
