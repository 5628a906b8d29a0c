"""What a budget can limit: the interface of a limit, and the registry of all limits."""

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
"""A limit as it was parsed: an absolute amount, or a level of bits."""
LayerAt = tuple[LayerSpec, LayerBits]
"""A layer at its widths."""


@dataclass(frozen=True)
class Reduction:
    """A limit as a differentiable function of real-valued widths, for strategies that learn widths under a penalty.

    The amount is `constant` plus the sum (or the maximum) over layers of coefficient × weight bits × activation bits.

    Args:
        coefficients: {searched layer: coefficient}.
        weight: Whether the weight width is a factor.
        activation: Whether the activation width is a factor; layers whose input stays float are then left out.
        over: "sum" or "max".
        constant: Added to the result.
    """

    coefficients: Mapping[str, float]
    weight: bool = True
    activation: bool = True
    over: Literal["sum", "max"] = "sum"
    constant: float = 0.0


class Limit(ABC):
    """One quantity that a budget can limit, such as BitOps or bytes.

    A subclass names the quantity, parses what people write, and says what a layer costs. It is registered by
    `register_limit`; `Budget(name=…)`, the solver, usage, reports, plots and the command line then know it.

    Attributes:
        name: Keyword of `Budget` and, with dashes, option of the command line.
        unit: What amounts are counted in, as it is printed behind them: "B", "J"; "" for a plain number.
        label: What the amount is, for reports and the axis of a plot.
        help: One sentence for the command line.
        over: How the costs of layers combine: "sum", or "max" for a limit on the largest of them.
        at_least: Whether the budget is a minimum that the policy must reach (a compression) instead of a maximum; `cap`
            and `whole` then say which greatest cost of the layers that is.
        whole_numbers: Whether amounts are whole numbers (operations, bytes).
        one_input: Whether layers that read one tensor are charged for it once (`together` says so). A search under such
            a limit gives those layers one activation width.
        level_parts: Parts that a level such as "W4A4" must name for this limit: "weight", "activation"; empty for a
            limit that takes absolute amounts only.
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
        """The level or the absolute amount that someone wrote.

        Raises:
            InvalidArgument: Neither, or a level that lacks a part this limit needs.
        """
        if not (self.level_parts and isinstance(value, str) and value.strip()[:1].upper() in ("W", "A")):
            return self.amount(value)
        level = LayerBits.parse(value)
        if any(getattr(level, part) == FLOAT_BITS for part in self.level_parts):
            raise InvalidArgument(
                f"{self.name}: level {level} lacks a part; write for example W4A4 (A4 for activations alone)"
            )
        return level

    @abstractmethod
    def amount(self, value: str | float) -> float:
        """The absolute amount that someone wrote; InvalidArgument when it is none."""

    def check(self, graph: LayerGraph) -> None:  # noqa: B027 (most limits are of any model)
        """InvalidArgument for a limit that is of another model, as a table of costs can be."""

    @abstractmethod
    def of_layer(self, layer: LayerSpec, bits: LayerBits) -> float:
        """What one layer costs at these widths."""

    def level(self, layer: LayerSpec, bits: LayerBits) -> LayerBits:
        """The widths that a level stands for in one layer; a part that it leaves out stands for 8 bits."""
        if layer.weight_only:
            return layer.fitted(bits)
        whole = replace(bits, weight=min(bits.weight, 8), activation=min(bits.activation, 8))
        return layer.fitted(whole)

    def beside(self, graph: LayerGraph, base_bytes: int) -> float:
        """What everything but the searched layers costs: fixed layers here; override it where float work counts too.

        Args:
            graph: The layers of the model.
            base_bytes: Bytes of the packed file beside the searched layers.
        """
        return self.together(fixed_of(graph))

    def combine(self, costs: list[float]) -> float:
        """The sum or the maximum of the costs of several layers."""
        return (max(costs, default=0) if self.over == "max" else sum(costs)) if costs else 0

    def together(self, layers: Sequence[LayerAt], beside: Sequence[LayerAt] = ()) -> float:
        """What several layers cost together, over and above what others cost already.

        Args:
            layers: Layers with their widths.
            beside: Others, whose cost is counted elsewhere.
        """
        return self.combine([self.of_layer(x, bits) for x, bits in layers])

    def cap(self, graph: LayerGraph, value: Value, base_bytes: int) -> float:
        """The greatest amount that the searched layers may take together under a limit of `value`."""
        if isinstance(value, LayerBits):
            return self.together([(x, self.level(x, value)) for x in graph.searched], fixed_of(graph))
        return value if self.over == "max" else value - self.beside(graph, base_bytes)

    def whole(self, graph: LayerGraph, searched: float, base_bytes: int) -> float | None:
        """The amount of the whole model, in the terms of the budget, when the searched layers take `searched`.

        None where the limit means nothing for this model.
        """
        return self.combine([searched, self.beside(graph, base_bytes)])

    def of_policy(self, graph: LayerGraph, policy: Policy, base_bytes: int) -> float | None:
        """The amount of the whole model at a policy; None where the limit means nothing for this model."""
        searched = self.together([(x, policy.bits[x.name]) for x in graph.searched], fixed_of(graph))
        return self.whole(graph, searched, base_bytes)

    def reduction(self, graph: LayerGraph) -> Reduction | None:
        """The searched layers' amount as a differentiable function; None leaves the limit to the solver."""
        return None

    def show(self, amount: float) -> str:
        """An amount for people: "30.1 KB"."""
        text = human(amount)
        joined = not self.unit or (len(self.unit) == 1 and text[-1].isalpha())  # 1.2 KB, but 236 B and 1.2 K mJ
        return f"{text}{self.unit}" if joined else f"{text} {self.unit}"


def fixed_of(graph: LayerGraph) -> list[LayerAt]:
    """The fixed layers of a graph at their widths."""
    return [(x, x.fixed) for x in graph if x.fixed is not None]


limits: Registry[Limit] = Registry("limit", "hub_mpq.cost")
"""All limits, in the order in which usage and reports list them."""


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
"""Names of arguments and options that stand beside the limits, which no limit can have."""


def register_limit(limit: Limit | Callable[[], Limit]) -> Limit | Callable[[], Limit]:
    """Make a limit known to budgets, the solver, reports, plots and the command line; also a class decorator.

    Args:
        limit: A `Limit`, or a subclass that takes no arguments, of which one is made.

    Returns:
        What was given.

    Raises:
        InvalidArgument: The name cannot be a keyword of `Budget` (`RESERVED`), another limit has it, the limit lacks a
            label, or it is a minimum without `cap` and `whole` of its own.

    Example:
        >>> @register_limit
        ... class Energy(Limit):
        ...     name, unit, label = "energy", "J", "energy of one sample"
        ...     def amount(self, value): return float(value)
        ...     def of_layer(self, layer, bits): return 1e-12 * layer.macs * bits.weight * bits.activation
        >>> mpq.search(energy=0.01)
    """
    made = limit if isinstance(limit, Limit) else limit()
    name = getattr(made, "name", None)
    if not isinstance(made, Limit) or not isinstance(name, str) or not name.isidentifier():
        raise InvalidArgument(f"a limit is a Limit named by a Python identifier, not {made!r} named {name!r}")
    if name in RESERVED or not made.label:
        why = f"{name!r} is an argument or an option already" if name in RESERVED else "it has no label"
        raise InvalidArgument(f"limit {name!r} cannot be registered: {why}")
    if made.at_least and (made.over == "max" or type(made).cap is Limit.cap or type(made).whole is Limit.whole):
        raise InvalidArgument(
            f"limit {name!r} is a minimum (at_least): it needs cap and whole of its own, and over='sum'"
        )
    limits.register(name, made)
    return limit
