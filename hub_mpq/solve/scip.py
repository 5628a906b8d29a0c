"""Solving with SCIP, for problems with too many partial policies to list."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .lagrangian import Dual
from .meet_in_the_middle import Accept, Progress
from .reduce import Core, NoPolicy

MAX_CUTS = 1000
"""Policies accepted within SCIP's tolerance but rejected by exact arithmetic, before giving up on a proof."""


def search_scip(core: Core, dual: Dual, accept: Accept, seconds: float, known: Progress) -> None:
    """Finish `known` with SCIP within `seconds`; NoPolicy if it proves that there is none.

    The objective is the distance of a policy from the dual bound, Σ reduced costs + prices·slacks, in units of the
    remaining window. SCIP's absolute tolerances are then far below any relevant difference, and a slack variable
    bounded by window / price tells the presolver how tight the limits are. `accept`: the exact check.
    """
    from pyscipopt import Model, quicksum

    deadline = time.perf_counter() + seconds
    m, n = len(core.caps), len(core.score)
    finite = np.isfinite(dual.reduced)
    window = known.above if math.isfinite(known.above) else float(np.where(finite, dual.reduced, 0).max(1).sum())
    unit = window if window > 0 else 1.0
    near = finite & (dual.reduced <= known.above + dual.slop)
    model: Any = Model()
    model.hideOutput()
    for name, value in {"limits/gap": 0.0, "limits/absgap": 0.0, "numerics/feastol": 1e-9}.items():
        model.setParam(name, value)
    spare = core.caps - core.cost[:, np.arange(n), dual.base].sum(1)
    variables: list[dict[int, Any]] = []
    for i in range(n):
        if time.perf_counter() > deadline:
            known.out_of_time = True
            return
        row = {int(j): model.addVar(vtype="B", obj=dual.reduced[i, j] / unit) for j in np.flatnonzero(near[i])}
        model.addCons(quicksum(row.values()) == 1)
        variables.append(row)
    slacks = []
    for d in range(m):
        price = dual.prices[d]
        widest = known.above / price if price > 0 else math.inf
        scale = min(core.caps[d], widest) or 1.0
        slack = model.addVar(lb=0.0, ub=1.0, obj=price * scale / unit)
        change = core.cost[d] - core.cost[d, np.arange(n), dual.base][:, None]
        terms = (change[i, j] / scale * x for i, row in enumerate(variables) for j, x in row.items() if change[i, j])
        model.addCons(quicksum(terms) + slack == spare[d] / scale)
        slacks.append((slack, change, scale))
    if known.choice is not None:
        _start(model, variables, slacks, spare, known.choice)
    _loop(model, variables, core, dual, accept, unit, deadline, known)


def _start(
    model: Any, variables: list[dict[int, Any]], slacks: list[Any], spare: Any, choice: NDArray[np.intp]
) -> None:
    solution = model.createSol()
    for row, pick in zip(variables, choice, strict=True):
        model.setSolVal(solution, row[int(pick)], 1.0)
    for d, (slack, change, scale) in enumerate(slacks):
        left = spare[d] - change[np.arange(len(choice)), choice].sum()
        model.setSolVal(solution, slack, max(float(left) / scale, 0.0))
    model.addSol(solution)


def _loop(
    model: Any,
    variables: list[dict[int, Any]],
    core: Core,
    dual: Dual,
    accept: Accept,
    unit: float,
    deadline: float,
    known: Progress,
) -> None:
    """Solve; while the solution fails the exact check, exclude it and solve again."""
    from pyscipopt import quicksum

    rows = np.arange(len(core.score))
    for _ in range(MAX_CUTS):
        if math.isfinite(deadline):
            model.setParam("limits/time", max(deadline - time.perf_counter(), 1e-3))
        model.optimize()
        status = model.getStatus()
        if status == "userinterrupt":
            raise KeyboardInterrupt
        if status == "infeasible" and math.isinf(known.above):
            raise NoPolicy
        refused = None
        if model.getNSols() > 0:
            best = model.getBestSol()
            choice = np.array([max(row, key=lambda j: model.getSolVal(best, row[j])) for row in variables])
            if accept(choice):
                slack = core.caps - core.cost[:, rows, choice].sum(1)
                known.take(choice, float(dual.reduced[rows, choice].sum() + dual.prices @ slack))
            else:
                refused = choice
        if status in ("optimal", "infeasible") and refused is None:
            known.done, known.proved = True, known.above
            return
        if status != "optimal" or refused is None:  # time or memory
            known.proved = min(max(known.proved, float(model.getDualbound()) * unit), known.above)
            break
        model.freeTransform()
        model.addCons(quicksum(row[int(j)] for row, j in zip(variables, refused, strict=True)) <= len(rows) - 1)
    known.out_of_time = True
