"""Run a strategy on a copy of a model: from data to scores that serve any number of budgets."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ..core import FLOAT_BITS, Budget, Candidates, LayerBits, LayerGraph, Policy
from ..errors import InvalidArgument
from ..nn.calibrate import sample_inputs
from ..train.batch import forward, labels_of
from ..train.engine import Engine
from ..train.finetune import Finetune
from ..train.loop import fit
from ..train.processes import mean_rows, share_samples
from .joint import first_batches
from .problem import searched_limits
from .scores import Scores
from .strategy import build_strategy


@dataclass(frozen=True)
class StrategyScores:
    """scores: {searched layer: {widths: score}}; sense: "min" when smaller is better. inferred: the widths that
    training settled on (DQ), None for others. provenance: JSON values."""

    scores: Scores
    sense: str
    strategy: str
    seed: int = 0
    inferred: Mapping[str, LayerBits] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def search_options(self) -> dict[str, Any]:
        """What `search_policy` should know beside the scores."""
        details = {"strategy": self.provenance}
        return {"sense": self.sense, "strategy": self.strategy, "seed": self.seed, "details": details}

    def within(self, candidates: Mapping[str, Candidates] | None) -> Scores:
        """The scores of some candidates only; InvalidArgument when a layer has none of them."""
        if candidates is None:
            return self.scores
        out = {
            name: {
                b: s
                for b, s in row.items()
                if b.weight in candidates[name].weight and b.activation in (*candidates[name].activation, FLOAT_BITS)
            }
            for name, row in self.scores.items()
            if name in candidates
        }
        if empty := [name for name, row in out.items() if not row]:
            raise InvalidArgument(f"layer {empty[0]!r} has no score at these candidates; search with them")
        return out

    def inferred_policy(self, graph: LayerGraph) -> Policy:
        """The policy without a budget; InvalidArgument for a strategy that needs one."""
        if self.inferred is None:
            raise InvalidArgument(
                f"strategy {self.strategy!r} infers no widths: name a budget, for example bitops='W4A4'"
            )
        return Policy({x.name: x.fixed or self.inferred[x.name] for x in graph}, graph.digest)


def train_scores(
    model: nn.Module,
    graph: LayerGraph,
    norms: Mapping[str, str],
    train: Iterable[Any],
    candidates: Mapping[str, Candidates],
    *,
    strategy: str,
    strategy_options: Mapping[str, Any] | None = None,
    budget: Budget | None = None,
    base_bytes: int = 0,
    epochs: float = 1,
    steps: int | None = None,
    share: float = 1.0,
    lr: float | None = None,
    smoothing: float = 0.1,
    distill: float | None = None,
    seed: int = 0,
    checkpoint_dir: str | Path | None = None,
    checkpoint_every: int = 500,
    resume: bool = False,
    engine: Engine | None = None,
) -> StrategyScores:
    """Scores of every searched layer and pair of widths, by a strategy of the registry; `model` itself stays as it is.

    budget: what strategies with a penalty aim at while they train. epochs, steps, share: length of the search
    (scorers that do not train ignore it). lr: of the weights, None: the strategy's. distill: as in `train_indicators`.
    """
    began = time.perf_counter()
    if not graph.searched:
        raise InvalidArgument("every layer is fixed: there is nothing to search")
    hooks = build_strategy(strategy, strategy_options)
    hooks.seed = seed
    if hooks.trains and any(c.float_inputs for c in candidates.values()):
        raise InvalidArgument(
            f"strategy {hooks.name!r} searches the widths of inputs too; weights alone: limpq or a scorer"
        )
    hooks.limits = searched_limits(graph, budget, base_bytes) if budget is not None else {}
    source = hooks.loader(train)
    engine = engine or Engine()
    accelerator = engine.accelerator(hooks.name, seed=seed)
    hooks.check_processes(accelerator.num_processes)
    batches = first_batches(source, hooks.batches, accelerator, seed)
    if distill is None:
        distill = 1.0 if labels_of(batches[0]) is None and labels_of(half(batches[0])) is None else 0.0
    teacher = copy.deepcopy(model).to(accelerator.device).eval().requires_grad_(False) if distill else None
    student = copy.deepcopy(model).requires_grad_(True).to(accelerator.device)
    hooks.loss = Finetune(
        lr=hooks.lr if lr is None else lr,
        scale_lr=hooks.scale_lr,
        weight_decay=hooks.weight_decay,
        smoothing=smoothing,
        teacher=teacher,
        distill=distill,
    )
    reading = [layer.name for layer in graph.searched if not layer.weight_only]
    inputs = share_samples(sample_inputs(student, [half(batch) for batch in batches], forward, reading))
    searched = {layer.name: candidates[layer.name] for layer in graph.searched}
    hooks.attach(student, graph, searched, norms)
    hooks.calibrate(student, batches, inputs)
    provenance: dict[str, Any] = {"strategy": hooks.name, "seed": seed, "distill": distill, "steps": 0}
    if hooks.trains and steps != 0:
        log = fit(
            student,
            hooks,
            source,
            epochs=epochs,
            steps=steps,
            share=share,
            optimizer=hooks.optimizer,
            seed=seed,
            checkpoint_dir=checkpoint_dir,
            checkpoint_every=checkpoint_every,
            resume=resume,
            label=hooks.name,
            accelerator=accelerator,
            engine=engine,
        )
        provenance |= {"steps": log.steps, "samples": log.samples, "step_seconds": round(log.step_seconds, 4)}
        provenance |= {"epoch_loss": [round(x, 5) for x in log.epoch_loss]}
    hooks.read_out(student, batches)
    scores = mean_rows(_complete(hooks.scores(student), hooks.name, graph))
    provenance |= {"seconds": round(time.perf_counter() - began, 3), **hooks.details(student)}
    return StrategyScores(scores, hooks.sense, hooks.name, seed, hooks.inferred(student), provenance)


def _complete(scores: Scores, strategy: str, graph: LayerGraph) -> Scores:
    """The scores of a strategy, which may be a user's own; InvalidArgument when the solver could not read them."""
    for layer in graph.searched:
        row = scores.get(layer.name)
        if not row or not all(isinstance(bits, LayerBits) for bits in row):
            raise InvalidArgument(f"strategy {strategy!r} must score layer {layer.name!r} at LayerBits, not {row!r}")
    return scores


def half(batch: Any) -> Any:
    """The training half of a pair of batches; a plain batch as it is."""
    paired = isinstance(batch, tuple) and len(batch) == 2 and isinstance(batch[0], (tuple, list, Mapping))
    return batch[0] if paired else batch
