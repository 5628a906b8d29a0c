"""A search from scores, whose policy is measured where there are batches for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from typing import Any

from torch import nn

from ..core import Budget, Candidates, Indicators, LayerGraph, SearchResult, Validation
from ..core.task import tasks
from ..errors import HubMPQError, InvalidArgument
from ..tasks import TaskLike
from ..train.processes import world
from ..train.round_weights import round_weights, weight_choices
from .candidates import weights_alone
from .held_out import HeldOut, apart, beyond, hold_out, spread
from .measure import PolicyMeter
from .policy_search import search_policy
from .scores import Scores, score_parts
from .space import SearchSpace
from .strategy import strategies
from .synthetic_data import synthetic_batch
from .validate import validated

Finish = Callable[[SearchResult, Budget], SearchResult]
"""Makes of a budget's optimum the policy that measures best."""


@dataclass(frozen=True)
class ScoredLayers:
    """What a search needs beside the budget.

    Args:
        graph: The layers of the model.
        indicators: Their scores.
        table: What the solver adds up: {searched layer: {widths: score}}.
        alpha: The multiplier that the table was made with.
        candidates: Widths of every searched layer.
        base_bytes: Bytes of the packed file beside the searched layers.
    """

    graph: LayerGraph
    indicators: Indicators
    table: Scores
    alpha: float
    candidates: Mapping[str, Candidates]
    base_bytes: int

    def optimum(self, budget: Budget, time_limit: float | None = None) -> SearchResult:
        """The policy of the best sum of scores."""
        scores = self.indicators
        return search_policy(
            self.graph,
            self.table,
            budget,
            base_bytes=self.base_bytes,
            sense=scores.sense,
            strategy=scores.strategy,
            seed=scores.seed,
            time_limit=time_limit,
            details={"training": scores.provenance} if scores.pairs else {"alpha": self.alpha},
        )


def on_batches(
    scored: ScoredLayers, model: nn.Module, batches: Iterable[Any], seconds: float | None, **more: Any
) -> Finish:
    """Measure on batches that are used for nothing else, part of which calibrate; arguments as for `measuring`.

    Where weights alone are quantized they are rounded by GPTQ first, as `HubMPQ.apply_policy` does it.
    """
    calibration, rest = apart(batches, scored.indicators.seed)
    if weights_alone(scored.graph, scored.candidates) and world()[1] == 1:
        choices = weight_choices(scored.graph, scored.candidates)
        told = {"task": more["task"], "example": more["example"]}
        more["rounded"] = round_weights(model, scored.graph, choices, calibration, **told)
    began = time.perf_counter()
    held = partial(hold_out, batches=rest, data="the batches given")
    return measuring(scored, model, calibration, held, seconds, began=began, **more)


def measuring(
    scored: ScoredLayers,
    model: nn.Module,
    calibration: Iterable[Any],
    held: Callable[[PolicyMeter], HeldOut],
    seconds: float | None,
    *,
    began: float,
    task: TaskLike,
    **more: Any,
) -> Finish:
    """Make the meter; what comes back measures the policies of one budget after another.

    Args:
        scored: What the searches are made of.
        model: The float model.
        calibration: Batches for scales and norms.
        held: Takes the held-out batches.
        seconds: See `default_seconds` for None; of the first budget the making of the meter is part.
        began: `time.perf_counter()` when that began.
        task: What the model is for, or None.
        more: For the `PolicyMeter`.
    """
    indicators = scored.indicators
    if task is None and indicators.provenance.get("task") in tasks:
        task = indicators.provenance["task"]  # held-out batches need no labels that would tell
    limit = default_seconds(indicators) if seconds is None else seconds
    meter = PolicyMeter(model, scored.graph, scored.candidates, calibration, task=task, **more)
    halves, start = held(meter), [began]

    def finish(result: SearchResult, budget: Budget) -> SearchResult:
        space = SearchSpace(scored.graph, scored.table, budget, scored.base_bytes, indicators.sense)
        return validated(
            result,
            space,
            meter,
            halves,
            candidates=scored.candidates,
            unit=indicators.unit,
            parts=score_parts(indicators, scored.table, scored.alpha),
            seconds=limit,
            began=start.pop() if start else None,  # what follows on the same batches begins when it does
        )

    return finish


def default_seconds(indicators: Indicators) -> float:
    """What measuring may take by default: a quarter of what the scores took, at least 30 s; of several processes at
    most 240, since the others wait for the main one, and not for ever."""
    seconds = max(30.0, float(indicators.provenance.get("seconds", 0.0)) / 4)
    return min(seconds, 240.0) if world()[1] > 1 else seconds


def search_measured(
    scored: ScoredLayers,
    model: nn.Module,
    budget: Budget,
    validate: bool | Iterable[Any],
    *,
    train: Iterable[Any] | None,
    val: Iterable[Any] | None,
    seconds: float | None,
    example: Any,
    **more: Any,
) -> SearchResult:
    """The search of `HubMPQ.quantize`: the optimum, or what measures better where there is something to measure on.

    Args:
        scored: What the search is made of.
        model: The float model.
        budget: The limits.
        validate: True: measure on `val`, or else on training batches that no score was read from. Batches: on these.
            False: don't.
        train: The training data, which calibrate.
        val: Held-out data.
        seconds: As for `measuring`.
        example: One input as the network takes it.
        more: For `measuring`.
    """
    result = scored.optimum(budget)
    if validate is False:
        return result
    began, seed = time.perf_counter(), scored.indicators.seed
    given = None if isinstance(validate, bool) else validate
    chosen = val if given is None else given
    if chosen is None and train is None:
        return replace(result, validation=Validation(False, "there are no data"))
    rest: Iterable[Any] = ()
    if train is None:  # norms stay as they are where there is nothing to estimate them on
        calibration: list[Any] = [synthetic_batch(model, example)]
        more["norm_batches"] = 0
    else:
        strategy = scored.indicators.strategy
        calibration, rest = beyond(train, seed, strategies.get(strategy).batches if strategy in strategies else 0)
    data = "training batches that no score was read from"
    if chosen is not None:
        rest, data = spread(chosen, seed), "val" if given is None else "the batches given"
    rest = iter(rest)
    first = list(islice(rest, 1))
    if not first and given is not None:
        raise InvalidArgument("validate holds no batch")
    if not first:
        return replace(result, validation=Validation(False, f"there are no {data}; give val= or validate="))
    held = partial(hold_out, batches=chain(first, rest), data=data)
    try:
        return measuring(scored, model, calibration, held, seconds, began=began, example=example, **more)(
            result, budget
        )
    except HubMPQError as error:
        if given is not None:
            raise
        return replace(result, validation=Validation(False, str(error), data))
