"""hub-mpq search, solve and pareto: no training, no weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from ..core import Budget
from ..core.result import proof_line
from . import models, show
from . import options as o


def search(
    model: o.Model,
    budget: Budget | None,
    loading: o.ModelOptions,
    reading: o.DataOptions,
    indicators: o.Indicators = None,
    candidates: o.ScoredBits = None,
    alpha: o.Alpha = None,
    validate: Annotated[
        o.Text,
        typer.Option(
            help="Images or text to measure policies on before one is chosen (--val in quantize); sources as "
            "for --data of quantize."
        ),
    ] = None,
    validate_seconds: o.ValidateSeconds = None,
    time_limit: o.TimeLimit = None,
    plot: o.Plot = None,
    as_json: o.Json = False,
) -> None:
    """Find the best policy within a budget, from trained indicators.

    Model weights are loaded only with --validate.
    """
    budget = budget or Budget()
    o.check_plot(plot)
    widths = o.candidates_of(candidates)
    mpq = models.load(model, loading, meta=validate is None)
    models.indicators_for(mpq, indicators)
    measured = None if validate is None else models.loader(mpq, validate, reading, train=False)
    more: dict[str, Any] = {"time_limit": time_limit, "validate": measured, "validate_seconds": validate_seconds}
    result = mpq.search(budget, alpha=alpha, candidates=widths, **more)
    models.tell_corrupt(measured)
    if plot is not None:
        from ..plot import plot_policy

        plot_policy(mpq.graph, result.policy, plot)
        show.saved(plot)
    show.emit(as_json, result.to_dict(), show.policy_table(result, mpq.graph))


def solve(
    file: Annotated[Path, typer.Argument(metavar="TABLE.json", help='Table of scores and costs; "-" reads stdin.')],
    time_limit: o.TimeLimit = None,
    as_json: o.Json = False,
) -> None:
    """Find the best choice per layer in your own table of scores and costs.

    A table is {"sense": "min" or "max", "layers": {LAYER: {CHOICE: {"score": NUMBER, "cost": {LIMIT: NUMBER}}}},
    "limits": {LIMIT: NUMBER}}.
    """
    from ..report import table
    from ..solve import solve_table

    tree = o.read_json(file)
    solution = solve_table(tree, time_limit=time_limit)
    limits = {name: cap if cap <= 1e308 else math.inf for name, cap in (tree.get("limits") or {}).items()}
    lines = [table(["layer", "choice"], [[name, choice] for name, choice in solution.choices.items()])]
    lines += [f"{name}: {used:.10g} of {limits[name]:.10g}" for name, used in solution.usage.items()]
    show.emit(as_json, solution.to_dict(), "\n".join([*lines, proof_line(solution)]))


def pareto(
    model: o.Model,
    budget: Budget | None,
    loading: o.NoWeights,
    indicators: o.Indicators = None,
    limit: Annotated[
        str, typer.Option(help="Limit to vary: bitops, size, weight-bits, activation-memory or latency.")
    ] = "bitops",
    points: Annotated[
        int, typer.Option(min=2, max=10_000, help="Number of budgets between the minimum and the maximum.")
    ] = 20,
    candidates: o.ScoredBits = None,
    alpha: o.Alpha = None,
    time_limit: o.TimeLimit = None,
    plot: o.Plot = None,
    as_json: o.Json = False,
) -> None:
    """Find the best policies along one limit, from trained indicators.

    Other limits, if given, apply at every point.
    """
    o.check_plot(plot)
    limit = limit.replace("-", "_")
    widths = o.candidates_of(candidates)
    mpq = models.load(model, loading, meta=True)
    models.indicators_for(mpq, indicators)
    results = mpq.pareto(limit, points, budget, alpha=alpha, candidates=widths, time_limit=time_limit)
    if plot is not None:
        from ..plot import plot_pareto

        plot_pareto({mpq.graph.model_id: results}, plot, x=limit)
        show.saved(plot)
    show.emit(as_json, {"limit": limit, "points": [r.to_dict() for r in results]}, show.front_table(results))
