"""Search a policy from scores, and measure it if there are batches for that."""

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
"""Turns the optimum of a budget into the policy that measures best."""


@dataclass(frozen=True)
class ScoredLayers:
    """Everything that a search needs apart from the budget.

    Args:
        graph: The layers of the model.
        indicators: Their scores.
        table: What the solver adds up: `{searched layer: {bit-widths: score}}`.
        alpha: The multiplier that the table was built with.
        candidates: `{searched layer: candidate bit-widths}`.
        base_bytes: Bytes of the packed file apart from the searched layers.
    """

    graph: LayerGraph
    indicators: Indicators
    table: Scores
    alpha: float
    candidates: Mapping[str, Candidates]
    base_bytes: int

    def optimum(self, budget: Budget, time_limit: float | None = None) -> SearchResult:
        """Find the policy with the best sum of scores."""
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
    """Prepare measurements on batches that are used for nothing else, some of them for calibration.

    If weights alone are quantized, they are first rounded by GPTQ, as in `HubMPQ.apply_policy`. The arguments are those
    of `measuring`.
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
    """Prepare the measurement of policies.

    Args:
        scored: What the searches need.
        model: The float model.
        calibration: Batches for scales and norms.
        held: Called with the meter; returns the held-out batches.
        seconds: Time limit for each budget; None for `default_seconds`. That of the first budget includes making the
            meter.
        began: `time.perf_counter()` when that began.
        task: Task of the model, or None.
        **more: Arguments of `PolicyMeter`.

    Returns:
        A function that measures the policies of a budget.
    """
    indicators = scored.indicators
    if task is None and indicators.provenance.get("task") in tasks:
        task = indicators.provenance["task"]  # held-out batches may have no labels to infer it from
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
            began=start.pop() if start else None,  # later budgets begin when they are called
        )

    return finish


def default_seconds(indicators: Indicators) -> float:
    """Return the default time limit for measuring: a quarter of the time that the scores took, at least 30 s.

    With several processes it is at most 240 s, since the others wait for the main one, with a timeout.
    """
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
    """Search as `HubMPQ.quantize` does: return the optimum, or what measures better if there are data to measure on.

    Args:
        scored: What the search needs.
        model: The float model.
        budget: The limits.
        validate: True to measure on `val`, or else on training batches that no score was computed from; batches to
            measure on them; False to measure nothing.
        train: The training data, for calibration.
        val: Held-out data.
        seconds: Time limit, see `measuring`.
        example: One input as the network takes it.
        **more: Arguments of `measuring`.
    """
    result = scored.optimum(budget)
    if validate is False:
        return result
    began, seed = time.perf_counter(), scored.indicators.seed
    given = None if isinstance(validate, bool) else validate
    chosen = val if given is None else given
    if chosen is None and train is None:
        return replace(result, validation=Validation(False, "no data to measure on; pass train=, val= or validate="))
    rest: Iterable[Any] = ()
    if train is None:  # without data, norms are not re-estimated
        calibration: list[Any] = [synthetic_batch(model, example)]
        more["norm_batches"] = 0
    else:
        strategy = scored.indicators.strategy
        calibration, rest = beyond(train, seed, strategies.get(strategy).batches if strategy in strategies else 0)
    data = "training batches not used for the scores"
    if chosen is not None:
        rest, data = spread(chosen, seed), "val" if given is None else "the batches given"
    rest = iter(rest)
    first = list(islice(rest, 1))
    if not first and given is not None:
        raise InvalidArgument("validate must hold at least one batch")
    if not first:
        why = "all training batches were used for the scores" if chosen is None else f"{data} holds no batch"
        return replace(result, validation=Validation(False, f"{why}; pass held-out data as val= (--val) or validate="))
    held = partial(hold_out, batches=chain(first, rest), data=data)
    try:
        return measuring(scored, model, calibration, held, seconds, began=began, example=example, **more)(
            result, budget
        )
    except HubMPQError as error:
        if given is not None:
            raise
        return replace(result, validation=Validation(False, str(error), data))
