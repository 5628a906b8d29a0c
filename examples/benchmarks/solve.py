"""Time of the exact solver beside PuLP/CBC and HiGHS on the same tables, all to gap 0.

    python examples/benchmarks/solve.py                          # golden case and 18, 52, 200, 1000 layers, 5 seeds
    python examples/benchmarks/solve.py --sizes golden,52 --timeout 30 --json solve.json

Times are wall times from the table (a dict) to the policy, including building the model but not imports and a first
tiny solve. Solvers take turns on each instance, so that load on the machine affects all of them. Peers get the plain
model with costs as fractions of their limit (raw BitOps of 1e10 exceed their tolerances) and one thread. Every answer
is checked: the sum of its scores against the others, its costs in exact integers. Peers that report "optimal" at gap 0
may still end slightly above the optimum, as their tolerances are 1e-6.

The random tables resemble the trained ResNet-50 indicators of LIMPQ (tests/solve/golden_limpq_resnet50.json):
log-normal MACs and weight counts with the golden means and spreads, scales that decrease with the bit-width by the
golden steps and are smaller for layers with more weights. Limits: BitOps of W3A4, bytes of 2.4 bits per weight.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from hub_mpq.solve import solve_table

GOLDEN = Path(__file__).parents[2] / "tests" / "solve" / "golden_limpq_resnet50.json"
WIDTHS = (2, 3, 4, 5, 6)
Answer = tuple[dict[str, str] | None, bool]  # policy, proved


def golden_table() -> dict[str, Any]:
    """Return the table of ResNet-50 at W3A4 and 12.2x compression, for which LIMPQ's authors published a policy."""
    data = json.loads(GOLDEN.read_text())
    case, rows, fixed = data["cases"][0], data["layers"], sum(data["fixed_weights"].values())
    layers = {}
    for name, row in rows.items():
        weight, activation = ({b: row[kind][str(b)] for b in WIDTHS} for kind in ("weight", "activation"))
        layers[name] = {
            f"W{w}A{a}": {
                "score": activation[a] + case["alpha"] * weight[w],
                "cost": {"bitops": row["macs_unfloored"] * w * a, "bits": row["weight_count"] * w},
            }
            for w in WIDTHS
            for a in WIDTHS
            if (w == 6 or weight[w] >= weight[w + 1]) and (a == 6 or activation[a] >= activation[a + 1])
        }
    bits = 32 * (sum(row["weight_count"] for row in rows.values()) + fixed) / case["compression"] - 8 * fixed
    limits = {"bitops": 12 * sum(row["macs_unfloored"] for row in rows.values()), "bits": math.floor(bits)}
    return {"sense": "min", "layers": layers, "limits": limits, "ties": []}


def random_table(n: int, seed: int) -> dict[str, Any]:
    """Return a table of n layers with 25 choices under two limits."""
    rng = np.random.default_rng([n, seed])
    z = rng.normal(size=(n, 2))
    log_macs, log_count = 18.0 + 0.45 * z[:, 0], 12.0 + 1.5 * (0.4 * z[:, 0] + math.sqrt(1 - 0.4**2) * z[:, 1])
    macs, count = np.exp(log_macs).astype(int).tolist(), np.maximum(np.exp(log_count), 64).astype(int).tolist()

    def scales(start: np.ndarray, steps: list[float], spread: list[float]) -> list[list[float]]:
        falls = np.minimum(rng.normal(steps, spread, size=(n, 4)), -0.02)
        return np.exp(start[:, None] + np.cumsum(np.c_[np.zeros(n), falls], axis=1)).tolist()

    size = log_count - 12
    weight = scales(
        -3.1 - 0.27 * size + 0.15 * rng.normal(size=n), [-0.68, -0.56, -0.53, -0.24], [0.08, 0.05, 0.06, 0.21]
    )
    activation = scales(
        -2.3 - 0.15 * size + 0.35 * rng.normal(size=n), [-0.44, -0.42, -0.42, -0.41], [0.04, 0.04, 0.065, 0.075]
    )
    layers = {
        f"layer{i}": {
            f"W{w}A{a}": {
                "score": activation[i][k] + 2 * weight[i][j],
                "cost": {"bitops": macs[i] * w * a, "bytes": -(-count[i] * w // 8)},
            }
            for j, w in enumerate(WIDTHS)
            for k, a in enumerate(WIDTHS)
        }
        for i in range(n)
    }
    limits = {"bitops": 12 * sum(macs), "bytes": int(sum(count) * 2.4 / 8)}
    return {"sense": "min", "layers": layers, "limits": limits, "ties": []}


def by_hub_mpq(table: dict[str, Any], timeout: float) -> Answer:
    solution = solve_table(table, time_limit=timeout)
    return dict(solution.choices), solution.status == "optimal"


def by_cbc(table: dict[str, Any], timeout: float) -> Answer:
    """Solve as LIMPQ does: PuLP and the CBC it ships."""
    import pulp

    problem = pulp.LpProblem("table", pulp.LpMinimize)
    x = {
        name: {choice: pulp.LpVariable(f"x{i}_{j}", cat="Binary") for j, choice in enumerate(row)}
        for i, (name, row) in enumerate(table["layers"].items())
    }
    cells = [(row[c], x[name][c]) for name, row in table["layers"].items() for c in row]
    problem += pulp.lpSum(cell["score"] * v for cell, v in cells)
    for row in x.values():
        problem += pulp.lpSum(row.values()) == 1
    for limit, cap in table["limits"].items():
        problem += pulp.lpSum(cell["cost"][limit] / cap * v for cell, v in cells) <= 1
    begin = time.perf_counter()
    problem.solve(pulp.PULP_CBC_CMD(msg=False, gapRel=0, gapAbs=0, timeLimit=timeout, threads=1))
    late = time.perf_counter() - begin > 0.97 * timeout  # PuLP says "Optimal" when the time limit struck
    if not any((v.value() or 0) > 0.5 for row in x.values() for v in row.values()):
        return None, False
    return {name: max(row, key=lambda c: row[c].value() or 0) for name, row in x.items()}, not late


def by_highs(table: dict[str, Any], timeout: float) -> Answer:
    """Solve by the Python interface of HiGHS, with the model passed as arrays."""
    import highspy

    keys = [(name, c) for name, row in table["layers"].items() for c in row]
    cells = [table["layers"][name][c] for name, c in keys]
    owner = np.repeat(np.arange(len(table["layers"])), [len(row) for row in table["layers"].values()])
    n, limits = len(table["layers"]), table["limits"]
    costs = np.array([[cell["cost"][k] / cap for cell in cells] for k, cap in limits.items()])
    model = highspy.HighsLp()
    model.num_col_, model.num_row_ = len(cells), n + len(limits)
    model.col_cost_ = np.array([cell["score"] for cell in cells])
    model.col_lower_, model.col_upper_ = np.zeros(len(cells)), np.ones(len(cells))
    model.row_lower_ = np.r_[np.ones(n), np.full(len(limits), -highspy.kHighsInf)]
    model.row_upper_ = np.ones(n + len(limits))
    model.integrality_ = [highspy.HighsVarType.kInteger] * len(cells)
    per = 1 + len(limits)
    model.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    model.a_matrix_.start_ = np.arange(len(cells) + 1) * per
    model.a_matrix_.index_ = np.vstack([owner, *(np.full(len(cells), n + i) for i in range(len(limits)))]).T.ravel()
    model.a_matrix_.value_ = np.vstack([np.ones(len(cells)), costs]).T.ravel()
    solver = highspy.Highs()
    options = {"output_flag": False, "mip_rel_gap": 0.0, "mip_abs_gap": 0.0, "time_limit": timeout, "threads": 1}
    for key, value in options.items():
        solver.setOptionValue(key, value)
    solver.passModel(model)
    solver.run()
    proved = solver.getModelStatus() == highspy.HighsModelStatus.kOptimal
    values = np.array(solver.getSolution().col_value)
    if len(values) == 0 or values.sum() < n - 0.5:
        return None, False
    return {name: c for (name, c), v in zip(keys, values, strict=True) if v > 0.5}, proved


SOLVERS: dict[str, Callable[[dict[str, Any], float], Answer]] = {
    "hub_mpq": by_hub_mpq,
    "CBC": by_cbc,
    "HiGHS": by_highs,
}


def measure(table: dict[str, Any], solver: str, timeout: float) -> dict[str, Any]:
    """Time one solve and check it with exact integers."""
    begin = time.perf_counter()
    policy, proved = SOLVERS[solver](table, timeout)
    seconds = time.perf_counter() - begin
    out: dict[str, Any] = {"solver": solver, "seconds": seconds, "proved": proved, "objective": None, "over": []}
    if policy is not None:
        cells = [table["layers"][name][choice] for name, choice in policy.items()]
        out["objective"] = math.fsum(cell["score"] for cell in cells)
        used = {k: sum(cell["cost"][k] for cell in cells) for k in table["limits"]}
        out["over"] = [k for k, cap in table["limits"].items() if used[k] > cap]
    return out


def run(sizes: list[str], seeds: int, timeout: float) -> list[dict[str, Any]]:
    for solver in SOLVERS:
        measure(random_table(6, 0), solver, timeout)
    rows, names = [], list(SOLVERS)
    for size in sizes:
        for seed in range(seeds):
            table = golden_table() if size == "golden" else random_table(int(size), seed)
            turn = names[seed % len(names) :] + names[: seed % len(names)]
            for solver in turn:
                rows.append({"size": size, "seed": seed, **measure(table, solver, timeout)})
                print(json.dumps(rows[-1]), flush=True)
    return rows


def report(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table: medians (minimum to maximum) over seeds; ratios of peers instance by instance."""
    peers = [name for name in SOLVERS if name != "hub_mpq"]
    head = [
        "instance",
        *(f"{name} s" for name in SOLVERS),
        *(f"{name} / hub_mpq" for name in peers),
        "optimum confirmed",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for size in dict.fromkeys(row["size"] for row in rows):
        here = {name: [r for r in rows if r["size"] == size and r["solver"] == name] for name in SOLVERS}
        cells = ["golden, 52 layers" if size == "golden" else f"{size} layers"]
        for name in SOLVERS:
            times = sorted(r["seconds"] for r in here[name])
            late = sum(not r["proved"] for r in here[name])
            text = f"{statistics.median(times):.3g} ({times[0]:.3g}–{times[-1]:.3g})"
            cells.append(text + (f", timed out {late} of {len(times)}" if late else ""))
        for name in peers:
            ratios = sorted(b["seconds"] / a["seconds"] for a, b in zip(here["hub_mpq"], here[name], strict=True))
            least = ">" if any(not r["proved"] for r in here[name]) else ""
            cells.append(f"{least}{statistics.median(ratios):.3g}× ({ratios[0]:.3g}–{ratios[-1]:.3g})")
        cells.append(agreement(here))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def agreement(here: dict[str, list[dict[str, Any]]]) -> str:
    """Tell whether no peer beat the optimum that hub_mpq proved, and how much worse the peers' "optima" are."""
    beaten, worse, over = False, 0.0, dict.fromkeys(here, 0)
    for mine, *others in zip(*here.values(), strict=True):
        for row in (mine, *others):
            over[row["solver"]] += bool(row["over"])
        for row in others:
            if row["objective"] is not None and not row["over"]:
                excess = (row["objective"] - mine["objective"]) / abs(mine["objective"])
                beaten |= excess < -1e-12
                worse = max(worse, excess if row["proved"] else 0.0)
    text = "NO" if beaten else "yes" if worse <= 1e-12 else f"yes; peers end up to {worse:.1e} above it"
    return text + "".join(f"; {name} over a limit {count}×" for name, count in over.items() if count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sizes", default="golden,18,52,200,1000", help="comma separated: golden, or a number of layers"
    )
    parser.add_argument("--seeds", type=int, default=5, help="instances per size (golden: repeats)")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds for one solve")
    parser.add_argument("--json", type=Path, help="file for all measurements")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    rows = run(arguments.sizes.split(","), arguments.seeds, arguments.timeout)
    print(f"\n{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, ", end="")
    print(
        f"load {load:.1f} before and {os.getloadavg()[0]:.1f} after, timeout {arguments.timeout:g} s\n\n{report(rows)}"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps({"timeout": arguments.timeout, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
