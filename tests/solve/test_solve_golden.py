"""The authors' trained ResNet-50 indicators: twelve budgets with optima proved by two other solvers."""

import json
import math
from pathlib import Path

import pytest

from hub_mpq.solve import solve_table

GOLDEN = json.loads((Path(__file__).parent / "golden_limpq_resnet50.json").read_text())
WIDTHS = sorted(GOLDEN["candidates"])


def available(scales):
    """LIMPQ: a width whose scale is below that of the next wider one is an outlier of joint training."""
    return [b for i, b in enumerate(WIDTHS) if b == WIDTHS[-1] or scales[str(b)] >= scales[str(WIDTHS[i + 1])]]


def golden_table(case):
    layers = {}
    for name, row in GOLDEN["layers"].items():
        layers[name] = {
            f"W{w}A{a}": {
                "score": row["activation"][str(a)] + case["alpha"] * row["weight"][str(w)],
                "cost": {"bitops": row["macs_unfloored"] * w * a, "bits": row["weight_count"] * w},
            }
            for w in available(row["weight"])
            for a in available(row["activation"])
        }
    limits, fixed = {}, sum(GOLDEN["fixed_weights"].values())
    if case["weight_level"]:
        macs = sum(row["macs_unfloored"] for row in GOLDEN["layers"].values())
        limits["bitops"] = macs * case["weight_level"] * case["activation_level"]
    if case["compression"]:
        weights = sum(row["weight_count"] for row in GOLDEN["layers"].values()) + fixed
        limits["bits"] = 32 * weights / case["compression"] - 8 * fixed
    return {"sense": "min", "layers": layers, "limits": limits, "ties": []}


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=range(len(GOLDEN["cases"])))
def test_case(case):
    solution = solve_table(golden_table(case))
    assert solution.status == "optimal"
    assert solution.gap == 0
    assert solution.bound == solution.objective
    assert math.isclose(solution.objective, case["objective"], rel_tol=0, abs_tol=1e-9)
    for kind, at in (("weight_bits", 1), ("activation_bits", 3)):
        mine = "".join(choice[at] for choice in solution.choices.values())
        assert sum(a == b for a, b in zip(mine, case[kind], strict=True)) == 52


def test_first_case_is_the_published_policy_and_says_who_published_it():
    assert GOLDEN["source"].startswith("1hunters/LIMPQ")
    case = GOLDEN["cases"][0]
    assert (case["weight_level"], case["activation_level"], case["compression"]) == (3, 4, 12.2)


def test_by_scip_alone(monkeypatch):
    """The general engine gives the same answer when the listing of part-policies is not allowed."""
    monkeypatch.setattr("hub_mpq.solve.half_enumeration.MAX_STATES", 0)
    case = GOLDEN["cases"][0]
    solution = solve_table(golden_table(case))
    assert solution.status == "optimal"
    assert math.isclose(solution.objective, case["objective"], rel_tol=0, abs_tol=1e-9)
    assert "".join(c[1] for c in solution.choices.values()) == case["weight_bits"]
