"""What a search strategy is: hooks around the one loop that end in scores for the one solver."""

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
    """Base of all strategies. Its constructor takes the options a user may give, by keyword.

    The driver (`train_scores`) sets `seed`, `searched` (names of the searched layers), `limits` and, after `loader`,
    `loss`. Then it calls, in this order, `attach`, `calibrate`, the hooks of the training loop, `read_out`,
    `indicators` (which asks for `scores`), `inferred`, `details`.

    trains: False for scorers that are done after `calibrate`. batches: how many batches `calibrate` gets.
    keeps_weights: it leaves the values of the model's Parameters as they are, which then share the float one's memory.
    sense: "min" when a smaller score is better. optimizer, lr, scale_lr, weight_decay: of the training.
    rounded: weights as they are going to be rounded, at all candidates, for scorers; None: to the nearest points.
    limits: {name: (limit, cap on what the searched layers take together)} of the budget searched for; may be empty.
    smoothing: of labels while it trains; None for the task's own.
    unit: what scores are counted in. weights_alone: whether it can search weights while inputs stay float; scorers can.
    stage: what its training is called in progress bars and logs; "" for its name. learned_once: scores that are there
    serve every later `quantize`, and without data its quantizers stay untrained; others are learned for each budget.
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
        """The batches to search on, made from the user's (pairs, a proxy, …)."""
        return train

    def attach(
        self, model: nn.Module, graph: LayerGraph, candidates: Mapping[str, Candidates], norms: Mapping[str, str]
    ) -> None:
        """Change `model`, a copy of the float one, in place. candidates: of the searched layers; norms: {BatchNorm:
        layer whose output it reads}."""
        raise NotImplementedError

    def calibrate(self, model: nn.Module, batches: Sequence[Any], inputs: Mapping[str, Tensor]) -> None:
        """Set starts. batches: the first `self.batches` ones; inputs: {layer: sample of what it reads in float}
        of the layers whose inputs have widths to choose from."""

    def own_groups(self) -> list[dict[str, Any]]:
        """Optimizer groups of the strategy's own parameters."""
        return []

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """The network's groups ("weights", "biases", "scales") without the strategy's own, then those."""
        own = self.own_groups()
        taken = {id(p) for group in own for p in group["params"]}
        groups = self.loss.parameter_groups(model)
        return [{**g, "params": [p for p in g["params"] if id(p) not in taken]} for g in groups] + own

    def items(self, batch: Any) -> float:
        return self.loss.items(batch)

    def samples(self, batch: Any) -> int:
        return self.loss.samples(batch)

    def read_out(self, model: nn.Module, batches: Sequence[Any]) -> None:
        """Training is over: what has to be measured before `scores`, on the batches that `calibrate` had."""

    def scores(self, model: nn.Module) -> Scores:
        """{searched layer: {widths: score}}."""
        raise NotImplementedError

    def indicators(self, model: nn.Module) -> Indicators:
        """What was found out, averaged over the processes, without provenance.

        Raises InvalidArgument when the scores, which may be a user's own, are none that the solver can read.
        """
        scores = self.scores(model)
        for name in self.searched:
            row = scores.get(name)
            if not row or not all(isinstance(bits, LayerBits) for bits in row):
                raise InvalidArgument(f"strategy {self.name!r} must score layer {name!r} at LayerBits, not {row!r}")
        return Indicators({}, {}, pairs=mean_rows(scores))

    def inferred(self, model: nn.Module) -> dict[str, LayerBits] | None:
        """Widths of the searched layers that training itself settled on, None when only a budget decides."""
        return None

    def details(self, model: nn.Module) -> dict[str, Any]:
        """What a report should say of this search, JSON values only."""
        return {}


def additive(
    graph: LayerGraph,
    weight: Mapping[str, Mapping[Any, float]],
    activation: Mapping[str, Mapping[int, float]],
) -> dict[str, dict[LayerBits, float]]:
    """Scores of every pair of widths from scores of weights, by width or by LayerBits, and of activations alone."""
    out = {}
    for layer in graph.searched:
        inputs = {FLOAT_BITS: 0.0} if layer.weight_only else activation.get(layer.name) or {FLOAT_BITS: 0.0}
        choices = {LayerBits(w, FLOAT_BITS) if isinstance(w, int) else w: s for w, s in weight[layer.name].items()}
        out[layer.name] = {replace(w, activation=a): s + t for w, s in choices.items() for a, t in inputs.items()}
    return out


strategies: Registry[type[SearchStrategy]] = Registry("strategy", f"{__package__}.built_in")
"""All strategies: the package's and those that were registered."""


def register_strategy(name: str) -> Callable[[type[SearchStrategy]], type[SearchStrategy]]:
    """Class decorator: makes a strategy known to `quantize(strategy=name)` and to `hub-mpq quantize --strategy`.

    Raises InvalidArgument when another class has the name, or the package itself.
    """

    def register(cls: type[SearchStrategy]) -> type[SearchStrategy]:
        strategies.register(name, cls)
        cls.name = name
        return cls

    return register


def strategy_named(name: str) -> type[SearchStrategy]:
    """The class of a strategy. "source:name" imports a module or a .py file first, which registers the name.

    Raises InvalidArgument for an unknown name or a source that cannot be imported.
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
            raise ImportError(f"{path} is no Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules.setdefault(path.stem, module)
        spec.loader.exec_module(module)
    except Exception as error:  # a user's file may raise anything
        why = f"{type(error).__name__}: {error}"
        raise InvalidArgument(f"the strategy's source {source!r} cannot be imported: {why}") from error


def infers_widths(name: str) -> bool:
    """Whether a strategy settles on widths without a budget."""
    return strategy_named(name).inferred is not SearchStrategy.inferred


def build_strategy(name: str, options: Mapping[str, Any] | None = None) -> SearchStrategy:
    """A strategy with its options; InvalidArgument for an option it does not have."""
    cls = strategy_named(name)
    try:
        return cls(**(options or {}))
    except TypeError as error:
        raise InvalidArgument(f"options of strategy {cls.name!r}: {error}") from error
