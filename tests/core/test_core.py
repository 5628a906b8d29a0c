import json

import pytest

from hub_mpq.core import (
    Budget,
    Candidates,
    FloatOp,
    LayerBits,
    LayerGraph,
    LayerSpec,
    Policy,
    QuantSpec,
    parse_bytes,
    parse_count,
)
from hub_mpq.errors import InvalidArgument, PolicyMismatch
from hub_mpq.search.candidates import resolve_candidates


def graph():
    return LayerGraph(
        "toy",
        None,
        "module",
        (3, 8, 8),
        (
            LayerSpec("stem", "conv2d", (4, 3, 3, 3), 6912, 108, 192, fixed=LayerBits(8, 8)),
            LayerSpec("body.0", "conv2d", (4, 4, 3, 3), 9216, 144, 256),
            LayerSpec("body.1", "linear", (10, 4), 40, 40, 4),
        ),
    )


def test_levels_parse_and_print():
    assert LayerBits.parse("W4A8") == LayerBits(4, 8)
    assert LayerBits.parse("w3") == LayerBits(3, 32)
    assert str(LayerBits(2, 6)) == "W2A6"


@pytest.mark.parametrize("text", ["", "4", "W", "W9A4", "W4A0", "A4W4", "four", None])
def test_nonsense_levels_are_refused(text):
    with pytest.raises(InvalidArgument):
        LayerBits.parse(text)


@pytest.mark.parametrize("widths", [[], [0], [9], [2.5], [True], 4, "234"])
def test_bad_candidates_are_refused(widths):
    with pytest.raises(InvalidArgument):
        Candidates.of(widths)


def test_amounts():
    assert parse_count("34.7G") == parse_count("34.7 GBitOps") == pytest.approx(34.7e9)
    assert parse_bytes("5.7MB") == pytest.approx(5.7e6)
    assert parse_bytes("4MiB") == 2**22
    assert parse_bytes(1000) == 1000


@pytest.mark.parametrize("text", ["34", "5 parsecs", "-1G", "nan", "", True, 0, float("inf")])
def test_amounts_without_unit_or_sense_are_refused(text):
    with pytest.raises(InvalidArgument):
        parse_count(text)


def test_budget_needs_a_limit():
    with pytest.raises(InvalidArgument):
        Budget()


def test_qspec_ranges():
    assert [(QuantSpec(b).qmin, QuantSpec(b).qmax) for b in (1, 2, 8)] == [(-1, 1), (-2, 1), (-128, 127)]
    assert [(QuantSpec(b, signed=False).qmin, QuantSpec(b, signed=False).qmax) for b in (1, 4)] == [(0, 1), (0, 15)]


def test_graph_round_trips_through_json():
    assert LayerGraph.from_dict(json.loads(json.dumps(graph().to_dict()))) == graph()


def test_pins_by_pattern():
    assert [layer.name for layer in graph().with_fixed({"stem": None, "body.*": "W4A4"}).searched] == ["stem"]
    with pytest.raises(InvalidArgument, match="matches none"):
        graph().with_fixed({"nothing*": "W4A4"})


def test_a_name_with_brackets_means_itself():
    names = ("a[0]", "a0", "a[1]")
    layers = tuple(LayerSpec(name, "linear", (4, 4), 16, 16, 4) for name in names)
    some = LayerGraph("toy", None, "module", (4,), layers, (FloatOp("b[0]", "GRU", 9, 9, "recurrent"),))
    assert some.match("a[0]") == ("a[0]",)
    assert some.match("a[[]*") == ("a[0]", "a[1]")
    assert some.match("a?") == ("a0",)
    assert [x.name for x in some.with_fixed({"a[1]": "W8A8"}).searched] == ["a[0]", "a0"]
    with pytest.raises(InvalidArgument, match="recurrent"):
        some.match("b[0]")
    widths = resolve_candidates(some, {"a[0]": [2, 4]})
    assert widths["a[0]"].weight == (2, 4) != widths["a0"].weight


def test_policy_of_another_model_is_refused():
    policy = Policy.uniform(graph(), "W4A4")
    policy.check(graph())
    assert policy.bits["stem"] == LayerBits(8, 8)
    other = Policy(
        {**{k: v for k, v in policy.bits.items() if k != "stem"}, "spare": LayerBits(2, 2)}, policy.graph_digest
    )
    with pytest.raises(PolicyMismatch, match=r"\['stem'\].*\['spare'\]"):
        other.check(graph())
