"""Bad tables get one sentence that names the layer; numbers of NumPy are numbers; answers are JSON."""

import copy
import json
import math

import numpy as np
import pytest

from hub_mpq.errors import InvalidArgument
from hub_mpq.solve import Solution, solve_table

GOOD = {
    "sense": "min",
    "layers": {
        "stem": {"4": {"score": 1.0, "cost": {"bytes": 4}}, "8": {"score": 0.5, "cost": {"bytes": 8}}},
        "head": {"4": {"score": 2.0, "cost": {"bytes": 4}}, "8": {"score": 0.1, "cost": {"bytes": 8, "ms": 3}}},
        "tail": {"8": {"score": 0.1, "cost": {"bytes": 1}}},
    },
    "limits": {"bytes": 13},
    "ties": [],
}


def change(path, value):
    table = copy.deepcopy(GOOD)
    at = table
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return table


def test_the_good_table():
    solution = solve_table(GOOD)
    assert solution.choices == {"stem": "4", "head": "8", "tail": "8"}
    assert isinstance(solution, Solution)
    assert json.loads(json.dumps(solution.to_dict())) == solution.to_dict()
    assert list(solution.to_dict()) == ["status", "objective", "bound", "gap", "seconds", "choices", "usage"]
    assert solution.usage == {"bytes": 13}  # "ms" is no limit here: ignored
    assert solve_table({**GOOD, "sense": "max"}).choices["stem"] == "4"


HEAD = ("layers", "head", "8")


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("sense",), "least", "sense"),
        (("sense",), None, "sense"),
        (("layers",), {}, "layers must be a mapping with at least one layer"),
        (("layers",), ["stem"], "layers must be a mapping with at least one layer"),
        (("layers", "head"), {}, "layer 'head' has no choices"),
        (("layers", "head"), None, "layer 'head' has no choices"),
        (HEAD, 3.0, "layer 'head', choice '8'"),
        (HEAD, {"cost": {}}, "layer 'head', choice '8': score must be a finite number, got None"),
        ((*HEAD, "score"), math.nan, "layer 'head', choice '8': score must be a finite number, got nan"),
        ((*HEAD, "score"), math.inf, "layer 'head', choice '8': score must be a finite number, got inf"),
        ((*HEAD, "score"), "1.0", "layer 'head', choice '8': score must be a finite number, got '1.0'"),
        ((*HEAD, "score"), True, "layer 'head', choice '8': score must be a finite number, got True"),
        ((*HEAD, "cost"), 3, "layer 'head', choice '8'"),
        (
            (*HEAD, "cost", "bytes"),
            -1,
            "layer 'head', choice '8': cost 'bytes' must be finite and non-negative, got -1",
        ),
        (
            (*HEAD, "cost", "bytes"),
            math.nan,
            "layer 'head', choice '8': cost 'bytes' must be finite and non-negative, got nan",
        ),
        (
            (*HEAD, "cost", "bytes"),
            math.inf,
            "layer 'head', choice '8': cost 'bytes' must be finite and non-negative, got inf",
        ),
        (
            (*HEAD, "cost", "bytes"),
            None,
            "layer 'head', choice '8': cost 'bytes' must be finite and non-negative, got None",
        ),
        ((*HEAD, "cost", "bytes"), 10**400, "too large"),
        (("limits",), 13, "limits must be a mapping"),
        (("limits", "bytes"), math.nan, "limit 'bytes' must be a non-negative number, got nan"),
        (("limits", "bytes"), -1, "limit 'bytes' must be a non-negative number, got -1"),
        (("limits", "bytes"), "13MB", "limit 'bytes' must be a non-negative number, got '13MB'"),
        (("ties",), [["stem", "body"]], "unknown layer 'body'"),
        (("ties",), ["stem"], "a tie must be a list"),
        (("layers", "tail"), {"16": {"score": 1.0}}, None),
    ],
)
def test_bad_tables(path, value, words):
    table = change(path, value)
    if words is None:
        table["ties"] = [["stem", "tail"]]
        words = r"tied layers \['stem', 'tail'\] have no choice in common"
    with pytest.raises(InvalidArgument, match=words):
        solve_table(table)


def test_a_table_is_a_mapping():
    with pytest.raises(InvalidArgument, match="mapping"):
        solve_table([GOOD])


def test_numbers_of_numpy():
    table = copy.deepcopy(GOOD)
    for row in table["layers"].values():
        for choice in row.values():
            choice["score"] = np.float32(choice["score"])
            choice["cost"] = {k: np.int64(v) for k, v in choice["cost"].items()}
    table["limits"] = {"bytes": np.int64(13)}
    solution = solve_table(table)
    assert solution.choices == solve_table(GOOD).choices
    json.dumps(solution.to_dict())


def test_limits_of_any_size():
    assert solve_table(change(("limits", "bytes"), 10**400)).choices["stem"] == "8"
    assert solve_table(change(("limits", "bytes"), 13.999)).usage == {"bytes": 13}


def test_ties_of_one_and_ties_that_touch():
    layers = {
        name: {"4": {"score": 2.0, "cost": {"k": 1}}, "8": {"score": 1.0, "cost": {"k": cost}}}
        for name, cost in {"a": 2, "b": 3, "c": 100}.items()
    }
    table = {"sense": "min", "layers": layers, "limits": {"k": 12}, "ties": [["a"]]}
    assert solve_table(table).choices == {"a": "8", "b": "8", "c": "4"}
    table["ties"] = [["a", "b"], ["b", "c"]]
    assert solve_table(table).choices == {"a": "4", "b": "4", "c": "4"}
    layers["d"] = layers["b"]
    table["ties"] = [["a", "b"], ["c", "d"], ["b", "c"]]
    assert solve_table(table).choices == {"a": "4", "b": "4", "c": "4", "d": "4"}


@pytest.mark.parametrize(
    ("start", "words"),
    [
        ({"stem": "4"}, "must name the same layers"),
        ({"stem": "4", "head": "5", "tail": "8"}, "layer 'head' has no choice '5'"),
    ],
)
def test_a_start_that_speaks_of_another_table(start, words):
    with pytest.raises(InvalidArgument, match=words):
        solve_table(GOOD, start=start)


def test_a_start_over_the_limit_or_against_a_tie_is_ignored():
    over = {"stem": "8", "head": "8", "tail": "8"}
    assert solve_table(GOOD, start=over).choices == solve_table(GOOD).choices
    tied = {**GOOD, "ties": [["stem", "head"]]}
    assert solve_table(tied, start={"stem": "4", "head": "8", "tail": "8"}).choices == solve_table(tied).choices
