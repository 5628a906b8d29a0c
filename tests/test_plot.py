"""Pictures: they are written, show every layer and number, and refuse what they cannot draw."""

from __future__ import annotations

import pytest

from hub_mpq import plot
from hub_mpq.core import Indicators, LayerBits, LayerGraph, LayerSpec, Policy, SearchResult, Usage
from hub_mpq.errors import HubMPQError, InvalidArgument, PolicyMismatch


def graph_of(count):
    def layer(i):
        kind = "embedding" if i == 1 else "linear"
        fixed = LayerBits(8, 8) if i == 0 else None
        return LayerSpec(f"blocks.{i}.fc", kind, (4, 4), 16, 16, 4, fixed=fixed)

    return LayerGraph("toy", None, "module", (4,), tuple(layer(i) for i in range(count)))


def texts_of(svg):
    return svg.read_text()


@pytest.fixture
def svg_text(monkeypatch):
    """Let matplotlib write text as text, so that a test can read it."""
    import matplotlib

    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")


@pytest.mark.parametrize("count", [1, 20, 130])
def test_every_layer_is_named(count, tmp_path, svg_text):
    graph = graph_of(count)
    policy = Policy.uniform(graph, "W3A5")
    plot.plot_policy(graph, policy, tmp_path / "policy.svg")
    text = texts_of(tmp_path / "policy.svg")
    assert all(f">{name}<" in text for name in graph.names)
    assert text.count(">float<") == (count > 1)  # the embedding reads indices
    assert text.count(">5<") == max(count - 2, 0)
    assert "pinned, not searched" in text


def test_policy_of_another_graph(tmp_path):
    with pytest.raises(PolicyMismatch):
        plot.plot_policy(graph_of(3), Policy.uniform(graph_of(4), "W4A4"), tmp_path / "policy.png")
    assert not list(tmp_path.iterdir())


def result(bitops, objective):
    usage = Usage({"bitops": bitops, "size": bitops / 10, "weight_bits": 4.0, "activation_memory": 1e3})
    return SearchResult(Policy({}, ""), usage, "optimal", objective, objective, 0.0, 0.0, "limpq")


@pytest.mark.parametrize("limit", ["bitops", "size", "weight_bits", "activation_memory"])
def test_fronts(limit, tmp_path, svg_text):
    front = [result(1e9 * i, 1 / i) for i in (1, 2, 3)]
    plot.plot_pareto({"ours": front, "theirs": front[1:]}, tmp_path / "front.svg", x=limit)
    text = texts_of(tmp_path / "front.svg")
    assert ">ours<" in text
    assert ">theirs<" in text
    with pytest.raises(InvalidArgument, match="at least one point"):
        plot.plot_pareto({"none": []}, tmp_path / "empty.svg")
    with pytest.raises(InvalidArgument, match="seconds"):
        plot.plot_pareto({"ours": front}, tmp_path / "empty.svg", x="seconds")


@pytest.mark.parametrize("count", [2, 70])
def test_indicators(count, tmp_path, svg_text):
    scales = {f"layer{i}": {2: 0.3, 4: 0.1 / (i + 1)} for i in range(count)}
    plot.plot_indicators(Indicators(scales, {"layer0": {2: 0.2}}), tmp_path / "indicators.svg")
    text = texts_of(tmp_path / "indicators.svg")
    assert all(f">{name}<" in text for name in scales)
    assert ">2 bits<" in text
    assert ">4 bits<" in text


def test_not_a_picture_and_no_matplotlib(tmp_path, monkeypatch):
    with pytest.raises(InvalidArgument, match=r"\.png"):
        plot.check_plot(tmp_path / "policy.txt")
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    with pytest.raises(HubMPQError, match=r"hub-mpq\[report\]"):
        plot.check_plot(tmp_path / "policy.png")


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    graph = graph_of(2)
    with pytest.raises(HubMPQError, match=r"cannot write .*policy\.png"):
        plot.plot_policy(graph, Policy.uniform(graph, "W4A4"), tmp_path / "file" / "policy.png")
