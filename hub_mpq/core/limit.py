"""The interface of a limit (a quantity that a budget can bound), and the registry of limits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ..errors import InvalidArgument
from .bits import FLOAT_BITS, LayerBits
from .layer import LayerGraph, LayerSpec
from .registry import Registry
from .result import Policy
from .units import human

Value = float | LayerBits
"""A parsed limit: an absolute amount, or a bit-width level."""
LayerAt = tuple[LayerSpec, LayerBits]
"""A layer and its bit-widths."""


@dataclass(frozen=True)
class Reduction:
    """A limit as a differentiable function of real-valued bit-widths, for strategies that learn them with a penalty.

    The amount is `constant` plus the sum (or the maximum) over layers of coefficient × weight bits × activation bits.

    Args:
        coefficients: {searched layer: coefficient}.
        weight: Whether the weight bit-width is a factor.
        activation: Whether the activation bit-width is a factor; layers whose input stays float are then skipped.
        over: "sum" or "max".
        constant: Added to the result.

    Example:
        >>> from hub_mpq.adapters import load
        >>> from hub_mpq.core import limits
        >>> reduction = limits.get("bitops").reduction(load("test_resnet", meta=True).graph)
        >>> reduction.over, reduction.weight, reduction.activation
        ('sum', True, True)
    """

    coefficients: Mapping[str, float]
    weight: bool = True
    activation: bool = True
    over: Literal["sum", "max"] = "sum"
    constant: float = 0.0


class Limit(ABC):
    """A quantity that a budget can limit, such as BitOps or bytes.

    A subclass names the quantity, parses its values and computes the cost of a layer. `register_limit` then makes it
    known to `Budget(name=…)`, the solver, usage, reports, plots and the command line.

    Attributes:
        name: Keyword of `Budget` and, with dashes, option of the command line.
        unit: Unit printed after amounts, such as "B" or "J"; "" for a plain number.
        label: What the amount measures, for reports and axes of plots.
        help: One sentence for the command line.
        over: How the costs of layers combine: "sum", or "max" for a limit on the largest one.
        at_least: Whether the budget is a lower bound (a compression) instead of an upper one; `cap` and `whole` then
            convert between the two.
        whole_numbers: Whether amounts are integers (operations, bytes).
        one_input: Whether layers that read one tensor are charged for it once, see `together`. A search under such a
            limit gives these layers one activation bit-width.
        level_parts: Parts that a level such as "W4A4" must specify for this limit: "weight", "activation"; empty for a
            limit that accepts absolute amounts only.

    Example:
        >>> from hub_mpq.core import limits
        >>> size = limits.get("size")
        >>> size.parse("5.7MB"), size.show(5.7e6), str(size.parse("W4"))
        (5700000.0, '5.700 MB', 'W4A32')
    """

    name: str
    unit: str = ""
    label: str = ""
    help: str = ""
    over: Literal["sum", "max"] = "sum"
    at_least: bool = False
    whole_numbers: bool = False
    one_input: bool = False
    level_parts: tuple[Literal["weight", "activation"], ...] = ()

    def parse(self, value: str | float) -> Value:
        """Parse a value of this limit.

        Args:
            value: An absolute amount or, if `level_parts` is not empty, a level.

        Returns:
            The amount or the level.

        Raises:
            InvalidArgument: It is neither, or the level lacks a part that this limit needs.
        """
        if not (self.level_parts and isinstance(value, str) and value.strip()[:1].upper() in ("W", "A")):
            return self.amount(value)
        level = LayerBits.parse(value)
        if any(getattr(level, part) == FLOAT_BITS for part in self.level_parts):
            raise InvalidArgument(
                f"{self.name}: level {level} lacks a part; use for example W4A4 (A4 for activations only)"
            )
        return level

    @abstractmethod
    def amount(self, value: str | float) -> float:
        """Parse an absolute amount.

        Args:
            value: A number, or a string with a unit.

        Returns:
            The amount in the limit's own unit.

        Raises:
            InvalidArgument: It is not a valid amount.
        """

    def check(self, graph: LayerGraph) -> None:  # noqa: B027 (most limits are of any model)
        """Check that the limit applies to a model; a table of costs, for example, belongs to one model.

        Args:
            graph: The model's layers.

        Raises:
            InvalidArgument: The limit belongs to another model.
        """

    @abstractmethod
    def of_layer(self, layer: LayerSpec, bits: LayerBits) -> float:
        """Compute the cost of one layer.

        Args:
            layer: The layer.
            bits: Its bit-widths.

        Returns:
            The cost in the limit's own unit.
        """

    def level(self, layer: LayerSpec, bits: LayerBits) -> LayerBits:
        """Return the bit-widths that a level means for one layer.

        Args:
            layer: The layer.
            bits: The level; an omitted part means 8 bits.

        Returns:
            The bit-widths.
        """
        if layer.weight_only:
            return layer.fitted(bits)
        whole = replace(bits, weight=min(bits.weight, 8), activation=min(bits.activation, 8))
        return layer.fitted(whole)

    def beside(self, graph: LayerGraph, base_bytes: int) -> float:
        """Compute the cost of everything but the searched layers.

        The default is the cost of the fixed layers; override it if float work counts too.

        Args:
            graph: The model's layers.
            base_bytes: Bytes of the packed file without the searched layers.

        Returns:
            The cost.
        """
        return self.together(fixed_of(graph))

    def combine(self, costs: list[float]) -> float:
        """Combine the costs of several layers.

        Args:
            costs: The costs.

        Returns:
            Their sum or, for `over = "max"`, their maximum; 0 if there are none.
        """
        return (max(costs, default=0) if self.over == "max" else sum(costs)) if costs else 0

    def together(self, layers: Sequence[LayerAt], beside: Sequence[LayerAt] = ()) -> float:
        """Compute the joint cost of several layers, in addition to the cost of others.

        Args:
            layers: Layers with their bit-widths.
            beside: Other layers with their bit-widths, whose cost is counted elsewhere; a shared input is not charged
                again.

        Returns:
            The additional cost.
        """
        return self.combine([self.of_layer(x, bits) for x, bits in layers])

    def cap(self, graph: LayerGraph, value: Value, base_bytes: int) -> float:
        """Compute the maximum joint cost of the searched layers under this limit.

        Args:
            graph: The model's layers.
            value: The limit, an amount or a level.
            base_bytes: Bytes of the packed file without the searched layers.

        Returns:
            The maximum.
        """
        if isinstance(value, LayerBits):
            return self.together([(x, self.level(x, value)) for x in graph.searched], fixed_of(graph))
        return value if self.over == "max" else value - self.beside(graph, base_bytes)

    def whole(self, graph: LayerGraph, searched: float, base_bytes: int) -> float | None:
        """Compute the amount of the whole model, comparable with the budget.

        Args:
            graph: The model's layers.
            searched: Joint cost of the searched layers.
            base_bytes: Bytes of the packed file without the searched layers.

        Returns:
            The amount; None if the limit does not apply to this model.
        """
        return self.combine([searched, self.beside(graph, base_bytes)])

    def of_policy(self, graph: LayerGraph, policy: Policy, base_bytes: int) -> float | None:
        """Compute the amount of the whole model at a policy.

        Args:
            graph: The model's layers.
            policy: The policy.
            base_bytes: Bytes of the packed file without the searched layers.

        Returns:
            The amount; None if the limit does not apply to this model.
        """
        searched = self.together([(x, policy.bits[x.name]) for x in graph.searched], fixed_of(graph))
        return self.whole(graph, searched, base_bytes)

    def reduction(self, graph: LayerGraph) -> Reduction | None:
        """Return the searched layers' amount as a differentiable function.

        Args:
            graph: The model's layers.

        Returns:
            The function; None if there is none, in which case only the solver enforces the limit.
        """
        return None

    def show(self, amount: float) -> str:
        """Format an amount for people, such as "30.1 KB".

        Args:
            amount: The amount.

        Returns:
            The number and the unit.
        """
        text = human(amount)
        joined = not self.unit or (len(self.unit) == 1 and text[-1].isalpha())  # 1.2 KB, but 236 B and 1.2 K mJ
        return f"{text}{self.unit}" if joined else f"{text} {self.unit}"


def fixed_of(graph: LayerGraph) -> list[LayerAt]:
    """The fixed layers of a graph with their bit-widths."""
    return [(x, x.fixed) for x in graph if x.fixed is not None]


limits: Registry[Limit] = Registry("limit", "hub_mpq.cost")
"""All limits, in the order in which usage and reports list them."""


def show_amount(name: str, amount: float) -> str:
    """The amount of a limit with its unit; that of an unregistered name without."""
    return limits.get(name).show(amount) if name in limits else human(amount)


_TAKEN = """
allow_inexact alpha as_json asymmetric batch_size bf16 budget calibration candidates channels_last checkpoint_dir
checkpoint_every checkpoint_path chunk_length class_map cls compile context costs cpu create_pr cycles cyclic_bits data
distill ema engine epochs example exclude export file finetune_options fixed float_copy folder format format_version
fsdp gradient_bits gradient_checkpointing gradient_quantizer group_size help indicator_epochs indicator_options
indicator_steps indicators input_size invocation json kwargs latency_table library limit limits local_files_only
log_every log_with lr max_corrupt model model_arg named optimizer others output overwrite per_channel per_expert pin
plot points policy pretrained processes quant_method reestimate_norms repo resident resume revision rounding runtime
scale_lr searched_bitops seed self smoothing steps strategy strategy_option strategy_options stride symmetric
sync_batch_norm target task text threads tie_fused time_limit train val validate validate_seconds version weight_decay
weight_only workers
"""
RESERVED = frozenset(_TAKEN.split())
"""Names of arguments and options that are used together with limits, and so cannot name a limit."""


def register_limit(limit: Limit | Callable[[], Limit]) -> Limit | Callable[[], Limit]:
    """Register a limit for budgets, the solver, reports, plots and the command line; also a class decorator.

    Args:
        limit: A `Limit`, or a subclass whose constructor takes no arguments.

    Returns:
        `limit`.

    Raises:
        InvalidArgument: The name is reserved or another limit has it, the limit has no label, or it is a lower bound
            that does not override `cap` and `whole`.

    Example:
        >>> from hub_mpq import Budget, Limit, register_limit
        >>> @register_limit
        ... class Energy(Limit):
        ...     name, unit, label = "energy", "J", "energy of one sample"
        ...
        ...     def amount(self, value):
        ...         return float(value)
        ...
        ...     def of_layer(self, layer, bits):
        ...         return 1e-12 * layer.macs * bits.weight * bits.activation
        >>> print(Budget(bitops="W4A4", energy=0.01))
        bitops W4A4, energy 0.01
    """
    made = limit if isinstance(limit, Limit) else limit()
    name = getattr(made, "name", None)
    if not isinstance(made, Limit) or not isinstance(name, str) or not name.isidentifier():
        raise InvalidArgument(
            f"a limit must be a Limit whose name is a Python identifier, got {made!r} with the name {name!r}"
        )
    if name in RESERVED or not made.label:
        why = f"{name!r} is already the name of an argument or option" if name in RESERVED else "it has no label"
        raise InvalidArgument(f"cannot register limit {name!r}: {why}")
    if made.at_least and (made.over == "max" or type(made).cap is Limit.cap or type(made).whole is Limit.whole):
        raise InvalidArgument(
            f"limit {name!r} is a lower bound (at_least): it must override cap and whole, and have over='sum'"
        )
    limits.register(name, made)
    return limit
