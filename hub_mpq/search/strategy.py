"""The interface of a search strategy: hooks around the training loop that produce scores for the solver."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from ..core import FLOAT_BITS, Candidates, Indicators, LayerBits, LayerGraph, Limit
from ..core.registry import Registry
from ..errors import InvalidArgument
from ..nn.rounded_weights import RoundedWeights
from ..train.finetune import Finetune
from ..train.hooks import Hooks
from ..train.processes import mean_rows
from .scores import Scores


class SearchStrategy(Hooks):
    """Base class of search strategies.

    Subclasses are registered with `register_strategy`. The keyword arguments of their constructor are the options of
    the strategy, which `strategy_options` of `HubMPQ.quantize` and `HubMPQ.train_scores` sets. A strategy implements at
    least `attach` and `scores`, and `losses` if it trains.

    The driver sets `seed`, `searched` and `limits`, calls `loader`, sets `loss`, and then calls, in this order,
    `attach`, `calibrate`, the hooks of the training loop, `read_out`, `indicators` (which calls `scores`), `inferred`
    and `details`.

    Attributes:
        name: Name of the strategy, set by `register_strategy`.
        unit: Unit of the scores; "" if they have none.
        weights_alone: Whether a strategy that trains can search weights while inputs stay float. Those that do not
            train always can.
        stage: Name of the training in progress bars and logs; "" for the strategy's name.
        learned_once: Whether existing scores serve every later `HubMPQ.quantize`, in which case quantizers stay
            untrained without data. Otherwise scores are learned for each budget.
        trains: False for strategies that are done after `calibrate`.
        keeps_weights: Whether it leaves the values of the model's Parameters unchanged, so that they can share memory
            with the float model.
        batches: Number of batches that `calibrate` receives.
        sense: "min" if smaller scores are better, else "max".
        optimizer: "adam" (AdamW) or "sgd" (momentum 0.9).
        lr: Learning rate of the weights.
        scale_lr: Learning rate of the scales.
        weight_decay: Weight decay of the weights.
        smoothing: Label smoothing during training; None for the task's default.
        loss: The task's loss, which also knows the distillation; set by the driver.
        rounded: The weights as they will be rounded, at all candidates, for strategies that do not train; None if they
            are rounded to nearest. Set by the driver.
        limits: `{name: (limit, cap on the total of the searched layers)}` of the budget; empty without one. Set by the
            driver.
        seed: Seed of the search, set by the driver.
        searched: Names of the searched layers, set by the driver.

    Example:
        >>> from hub_mpq import HubMPQ, SearchStrategy, register_strategy
        >>> from hub_mpq.search.strategy import additive
        >>> @register_strategy("weight-count")
        ... class WeightCount(SearchStrategy):
        ...     trains = False
        ...     def attach(self, model, graph, candidates, norms):
        ...         self.graph, self.candidates = graph, candidates
        ...     def scores(self, model):
        ...         def error(layer, widths):
        ...             return {bits: 4.0**-bits / layer.weight_count for bits in widths}
        ...         layers = [(layer, self.candidates[layer.name]) for layer in self.graph.searched]
        ...         weight = {layer.name: error(layer, c.weight) for layer, c in layers}
        ...         activation = {layer.name: error(layer, c.activation) for layer, c in layers}
        ...         return additive(self.graph, weight, activation)
        >>> mpq = HubMPQ.from_pretrained("test_resnet", pretrained=False)
        >>> scores = mpq.train_scores([mpq.source.example], strategy="weight-count")
        >>> mpq.search(bitops="W4A4").chosen_by
        'optimum'
    """

    name: ClassVar[str] = ""
    unit: str = ""
    weights_alone: bool = False
    stage: str = ""
    learned_once: bool = False
    trains: bool = True
    keeps_weights: bool = False
    batches: int = 1
    sense: str = "min"
    optimizer: str = "adam"
    lr: float = 1e-4
    scale_lr: float = 1e-2
    weight_decay: float = 0.0
    smoothing: float | None = None
    loss: Finetune
    rounded: RoundedWeights | None = None
    limits: Mapping[str, tuple[Limit, float]] = {}
    seed: int = 0
    searched: Sequence[str] = ()

    def loader(self, train: Iterable[Any]) -> Iterable[Any]:
        """Make the batches of the search from those of the user, for example pairs or a proxy.

        Args:
            train: The user's batches.

        Returns:
            The batches that the strategy trains or calibrates on.
        """
        return train

    def attach(
        self, model: nn.Module, graph: LayerGraph, candidates: Mapping[str, Candidates], norms: Mapping[str, str]
    ) -> None:
        """Prepare the model for the search, in place.

        Args:
            model: A copy of the float model.
            graph: Its layers.
            candidates: `{searched layer: its candidate bit-widths}`.
            norms: `{BatchNorm: layer whose output it normalizes}`.
        """
        raise NotImplementedError

    def calibrate(self, model: nn.Module, batches: Sequence[Any], inputs: Mapping[str, Tensor]) -> None:
        """Initialize the quantizers, or compute the scores if the strategy does not train.

        Args:
            model: The prepared model.
            batches: The first `self.batches` batches of the search.
            inputs: `{layer: sample of its float input}`, for the layers whose input bit-width is searched.
        """

    def own_groups(self) -> list[dict[str, Any]]:
        """List the optimizer groups of the strategy's own parameters.

        Returns:
            Groups as in `parameter_groups`.
        """
        return []

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """List the optimizer groups: "weights", "biases" and "scales" of the network, then the strategy's own.

        Args:
            model: The prepared model.

        Returns:
            `[{"name", "params", "lr", "weight_decay"}]`; each parameter is in one group.
        """
        own = self.own_groups()
        taken = {id(p) for group in own for p in group["params"]}
        groups = self.loss.parameter_groups(model)
        return [{**g, "params": [p for p in g["params"] if id(p) not in taken]} for g in groups] + own

    def items(self, batch: Any) -> float:
        return self.loss.items(batch)

    def samples(self, batch: Any) -> int:
        return self.loss.samples(batch)

    def read_out(self, model: nn.Module, batches: Sequence[Any]) -> None:
        """Measure what `scores` needs after training.

        Args:
            model: The trained model.
            batches: The batches that `calibrate` received.
        """

    def scores(self, model: nn.Module) -> Scores:
        """Score every candidate of every searched layer.

        Args:
            model: The trained model.

        Returns:
            `{searched layer: {LayerBits: score}}`; the scores of the layers are added up by the solver.
        """
        raise NotImplementedError

    def indicators(self, model: nn.Module) -> Indicators:
        """Collect the scores, averaged over the processes.

        Args:
            model: The trained model.

        Returns:
            The scores, without provenance.

        Raises:
            InvalidArgument: `scores` returned something that the solver cannot read.
        """
        scores = self.scores(model)
        for name in self.searched:
            row = scores.get(name)
            if not row or not all(isinstance(bits, LayerBits) for bits in row):
                raise InvalidArgument(
                    f"scores of strategy {self.name!r} for layer {name!r} must be {{LayerBits: score}}, got {row!r}"
                )
        return Indicators({}, {}, pairs=mean_rows(scores))

    def inferred(self, model: nn.Module) -> dict[str, LayerBits] | None:
        """Return the bit-widths that training settled on.

        Args:
            model: The trained model.

        Returns:
            `{searched layer: bit-widths}`, or None for strategies that need a budget to choose.
        """
        return None

    def details(self, model: nn.Module) -> dict[str, Any]:
        """Return details of the search, which are stored with the scores.

        Args:
            model: The trained model.

        Returns:
            `{name: value}`, JSON values only.
        """
        return {}


def additive(
    graph: LayerGraph,
    weight: Mapping[str, Mapping[Any, float]],
    activation: Mapping[str, Mapping[int, float]],
) -> dict[str, dict[LayerBits, float]]:
    """Add up scores of weights and of activations to scores of every pair of bit-widths.

    Args:
        graph: The layers of the model.
        weight: `{layer: {bits or LayerBits: score}}` of weights.
        activation: `{layer: {bits: score}}` of activations; layers whose input stays float are omitted.

    Returns:
        `{searched layer: {LayerBits: score}}`.
    """
    out = {}
    for layer in graph.searched:
        inputs = {FLOAT_BITS: 0.0} if layer.weight_only else activation.get(layer.name) or {FLOAT_BITS: 0.0}
        choices = {LayerBits(w, FLOAT_BITS) if isinstance(w, int) else w: s for w, s in weight[layer.name].items()}
        out[layer.name] = {replace(w, activation=a): s + t for w, s in choices.items() for a, t in inputs.items()}
    return out


strategies: Registry[type[SearchStrategy]] = Registry("strategy", f"{__package__}.built_in")
"""All strategies, built-in and registered."""


def register_strategy(name: str) -> Callable[[type[SearchStrategy]], type[SearchStrategy]]:
    """Register a search strategy, as a class decorator.

    The strategy is then available as `strategy=name` of `HubMPQ.quantize` and `HubMPQ.train_scores`, and as
    `--strategy` on the command line.

    Args:
        name: Name of the strategy.

    Returns:
        The decorator, which returns the class.

    Raises:
        InvalidArgument: The name belongs to another class, or to the package.

    Example:
        >>> from hub_mpq import SearchStrategy, register_strategy
        >>> @register_strategy("mine")
        ... class Mine(SearchStrategy):
        ...     pass
        >>> Mine.name
        'mine'
    """

    def register(cls: type[SearchStrategy]) -> type[SearchStrategy]:
        strategies.register(name, cls)
        cls.name = name
        return cls

    return register


def strategy_named(name: str) -> type[SearchStrategy]:
    """Return the class of a strategy.

    Args:
        name: Its name, or "source:name" to first import the module or .py file that registers the name.

    Returns:
        The class.

    Raises:
        InvalidArgument: The name is unknown, or the source cannot be imported.
    """
    source, _, name = name.rpartition(":")
    if source:
        _import(source)
    return strategies.get(name)


def _import(source: str) -> None:
    try:
        if not source.endswith(".py"):
            importlib.import_module(source)
            return
        path = Path(source).resolve()
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if spec is None or spec.loader is None:
            raise ImportError(f"{path} is not a Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules.setdefault(path.stem, module)
        spec.loader.exec_module(module)
    except Exception as error:  # a user's file may raise anything
        why = f"{type(error).__name__}: {error}"
        raise InvalidArgument(f"cannot import the source {source!r} of the strategy: {why}") from error


def infers_widths(name: str) -> bool:
    """Whether a strategy chooses bit-widths without a budget."""
    return strategy_named(name).inferred is not SearchStrategy.inferred


def build_strategy(name: str, options: Mapping[str, Any] | None = None) -> SearchStrategy:
    """Build a strategy with its options.

    Raises:
        InvalidArgument: The strategy is unknown, or does not have an option.
    """
    cls = strategy_named(name)
    try:
        return cls(**(options or {}))
    except TypeError as error:
        raise InvalidArgument(f"options of strategy {cls.name!r}: {error}") from error
