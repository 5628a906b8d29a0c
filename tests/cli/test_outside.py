"""Parts registered from outside the package: a model of another library with another kind of layer, searched within
another limit by another strategy, from Python and from the command line, saved and loaded again."""

from __future__ import annotations

import json
from dataclasses import dataclass
from inspect import signature
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from typer.main import get_command

import hub_mpq
from hub_mpq import (
    Budget,
    HubMPQ,
    LayerKind,
    Library,
    Limit,
    MPQConfig,
    SearchStrategy,
    Task,
    register_layer_kind,
    register_library,
    register_limit,
    register_runtime,
    register_strategy,
    register_task,
)
from hub_mpq.adapters import Source, build_graph
from hub_mpq.core import layer_kinds, libraries, limits, parse_ratio, runtimes, tasks
from hub_mpq.core.files import PACKED
from hub_mpq.errors import HubMPQError, InfeasibleBudget, InvalidArgument, PackedFormat
from hub_mpq.nn.layers import operands
from hub_mpq.nn.packed import PackedLayer
from hub_mpq.pack import read_manifest, read_packed
from hub_mpq.plot import plot_pareto
from hub_mpq.search.strategy import additive, strategies

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


class Unscaled(nn.Linear):
    """A linear layer whose output is divided by its width: no nn.Linear to anybody."""

    def forward(self, x):
        return F.linear(x, self.weight, self.bias) / self.in_features


class QuantUnscaled(Unscaled):
    def forward(self, x):
        x, weight = operands(self, x)
        return F.linear(x, weight, self.bias) / self.in_features


class PackedUnscaled(PackedLayer, Unscaled):
    forward = QuantUnscaled.forward


class Tiny(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(6, 8), nn.ReLU(), Unscaled(8, 10), nn.ReLU(), Unscaled(10, 8), nn.Linear(8, 3))


class Toys(Library):
    name = "toys"

    def knows(self, model_id):
        return model_id.startswith("toys:")

    def owns(self, config):
        return config.get("made_by") == "toys"

    def load(self, model_id, *, pretrained, meta, exclude=(), **kwargs):
        with torch.random.fork_rng(devices=[]), torch.device("meta" if meta else "cpu"):
            torch.manual_seed(0)
            net = Tiny().eval()
        graph = build_graph(net, (X[:1],), model_id=model_id, library=self.name, exclude=exclude)
        return Source(net, model_id, None, self.name, (X[:1],), graph, config={"made_by": "toys"})


class Energy(Limit):
    """Millijoule: a multiplication costs the product of its widths, and waking a layer up costs 100."""

    name, unit, label = "energy", "mJ", "energy of one sample"
    level_parts = ("weight", "activation")

    def amount(self, value):
        return parse_ratio(value, self.name)

    def of_layer(self, layer, bits):
        return 100 + 0.5 * layer.macs * bits.weight * bits.activation


class Ranks(Task):
    """The class number as the distance from the expected one: absolute error, in ranks."""

    name = "ranks"

    def item_loss(self, output, labels, smoothing=0.0):
        classes = torch.arange(output.shape[1], dtype=torch.float32)
        values = ((output.softmax(1) * classes).sum(1) - labels).abs()
        return values, labels >= 0


@pytest.fixture
def outside():
    """Everything registered, and forgotten afterwards."""
    register_layer_kind(
        LayerKind(
            "unscaled",
            channel_axis=0,
            row_axes=(0, 1),
            types=(f"{Unscaled.__module__}.Unscaled",),
            quantized=QuantUnscaled,
            packed=PackedUnscaled,
        )
    )
    register_library(Toys())
    register_limit(Energy)
    register_task(Ranks())

    @register_strategy("narrowest-first")
    class NarrowestFirst(SearchStrategy):
        """Prefers few bits in the layers that run first; needs no data."""

        trains, sense, unit = False, "max", "preference"

        def attach(self, model, graph, candidates, norms):
            self.graph, self.candidates = graph, candidates

        def scores(self, model):
            weight = {
                x.name: {b: float(i * b) for b in self.candidates[x.name].weight}
                for i, x in enumerate(self.graph.searched)
            }
            inputs = {x.name: {b: float(b) for b in self.candidates[x.name].activation} for x in self.graph.searched}
            return additive(self.graph, weight, inputs)

    yield
    layer_kinds.unregister("unscaled")
    libraries.unregister("toys")
    limits.unregister("energy")
    strategies.unregister("narrowest-first")
    tasks.unregister("ranks")


def test_the_whole_route(outside, tmp_path):
    mpq = HubMPQ.from_pretrained("toys:tiny", pretrained=False)
    assert {x.kind for x in mpq.graph.searched} == {"unscaled"}
    level = mpq.usage("W4A4")["energy"]
    # what is fixed counts too: two linear layers at 8 bits beside two searched ones at 4
    assert level == 4 * 100 + 0.5 * ((48 + 24) * 64 + 160 * 16)
    mpq.quantize(energy="W4A4", strategy="narrowest-first", train=[X], epochs=0)
    first, second = (x.name for x in mpq.graph.searched)
    assert mpq.usage()["energy"] <= level
    assert mpq.policy.bits[first].weight < mpq.policy.bits[second].weight
    assert mpq.result.details["budget"] == "energy W4A4"
    assert f"energy of one sample: {limits.get('energy').show(mpq.usage()['energy'])}" in mpq.report()
    mpq.save_pretrained(tmp_path / "out")
    again = HubMPQ.from_pretrained(tmp_path / "out")
    assert torch.equal(again(X), mpq(X))
    assert again.usage()["energy"] == mpq.usage()["energy"]
    assert again.scores == mpq.scores
    assert (again.scores.unit, again.scores.sense) == ("preference", "max")
    with pytest.raises(InfeasibleBudget, match=r"energy <= 1 mJ \(minimum "):
        mpq.search(energy=1)


def test_a_task_is_known_by_its_name(outside, run, tmp_path):
    y = torch.tensor([0, 1, 2, -1])
    mpq = HubMPQ.from_pretrained("toys:tiny", pretrained=False, task="ranks")
    mpq.quantize(bitops="W3A3", train=[(X, y)], epochs=0, indicator_options={"steps": 2})
    assert mpq.scores.provenance["task"] == "ranks"
    before = mpq.evaluate([(X, y)])
    with torch.no_grad():
        wanted = ((mpq(X).softmax(1) * torch.arange(3)).sum(1) - y).abs()[:3].mean()
    assert before["loss"] == pytest.approx(float(wanted), rel=1e-5)
    mpq.finetune([(X, y)], epochs=30, lr=1e-2)
    assert mpq.evaluate([(X, y)])["loss"] < before["loss"]
    mpq.save_pretrained(tmp_path / "out")
    assert "quantized: task ranks, loss" in mpq.report()
    for arguments in (
        ("evaluate", tmp_path / "out"),
        ("quantize", "toys:tiny", "--bitops", "W4A4", "-o", tmp_path / "x"),
    ):
        refused = run(*arguments, "--data", tmp_path, "--task", "rank")
        assert refused.exit_code == 2
        assert "unknown task 'rank'; choose from" in refused.stderr
        assert "ranks" in refused.stderr


def test_a_front_and_its_picture(outside, tmp_path):
    mpq = HubMPQ.from_pretrained("toys:tiny", pretrained=False)
    mpq.train_scores([X], strategy="narrowest-first")
    front = mpq.pareto("energy", 6)
    assert len(front) > 2
    assert all(a.usage["energy"] < b.usage["energy"] for a, b in pairwise(front))
    plot_pareto({"toys": front}, tmp_path / "front.svg", x="energy")
    assert (tmp_path / "front.svg").stat().st_size > 1000


def test_the_command_line(outside, run, tmp_path):
    mpq = HubMPQ.from_pretrained("toys:tiny", pretrained=False)
    mpq.quantize(energy="W3A3", strategy="narrowest-first", train=[X], epochs=0).save_pretrained(tmp_path / "out")
    assert "--energy" in run("search", "--help").stdout
    assert "energy" in run("inspect", "toys:tiny").stdout
    scores = tmp_path / "out" / "indicators.safetensors"
    found = json.loads(run("search", "toys:tiny", "--indicators", scores, "--energy", "3300", "--json").stdout)
    assert 2704 < found["usage"]["energy"] <= 3300
    assert found["strategy"] == "narrowest-first"
    packed = json.loads(run("inspect", tmp_path / "out", "--json").stdout)
    assert packed["usage"]["energy"] == mpq.usage()["energy"]
    front = run("pareto", "toys:tiny", "--indicators", scores, "--limit", "energy", "--points", "4").stdout
    assert "energy" in front.splitlines()[0]
    refused = run("search", "toys:tiny", "--indicators", scores, "--energy", "lots")
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)


@pytest.mark.parametrize("read", [read_packed, read_manifest, HubMPQ.from_pretrained])
def test_a_kind_that_nobody_registered_is_refused_by_name(outside, tmp_path, read):
    mpq = HubMPQ.from_pretrained("toys:tiny", pretrained=False)
    mpq.apply_policy("W4A4", [X]).save_pretrained(tmp_path / "out")
    layer_kinds.unregister("unscaled")
    with pytest.raises(PackedFormat, match="'unscaled'"):
        read(tmp_path / "out" if read == HubMPQ.from_pretrained else tmp_path / "out" / PACKED)


def test_a_library_that_nobody_registered_is_refused_by_name(outside, tmp_path):
    mpq = HubMPQ.from_pretrained("toys:tiny", pretrained=False)
    mpq.apply_policy("W4A4", [X]).save_pretrained(tmp_path / "out")
    libraries.unregister("toys")
    with pytest.raises(HubMPQError, match="'toys'"):
        HubMPQ.from_pretrained(tmp_path / "out")


def test_a_limit_that_is_not_registered_is_named():
    with pytest.raises(InvalidArgument, match="unknown option or limit 'energy'; limits: bitops, size"):
        Budget(energy=5)


def test_names_are_given_once(outside):
    register_limit(Energy)  # a cell of a notebook that runs again
    with pytest.raises(InvalidArgument, match="is already registered"):
        register_limit(type("Power", (Energy,), {}))
    with pytest.raises(InvalidArgument, match="is a built-in limit of hub_mpq"):
        register_limit(type("Mine", (Energy,), {"name": "bitops"}))
    with pytest.raises(InvalidArgument, match="identifier"):
        register_limit(type("Mine", (Energy,), {"name": "energy per day"}))
    for name in ("alpha", "output", "searched_bitops"):
        with pytest.raises(InvalidArgument, match="already"):
            register_limit(type("Mine", (Energy,), {"name": name}))
    with pytest.raises(InvalidArgument, match="no label"):
        register_limit(type("Mine", (Energy,), {"name": "mine", "label": ""}))
    for over in ("sum", "max"):
        with pytest.raises(InvalidArgument, match="must override cap and whole"):
            register_limit(type("Mine", (Energy,), {"name": "mine", "at_least": True, "over": over}))


def test_no_argument_or_option_can_be_the_name_of_a_limit():
    """A new parameter that stands beside the limits has to be in the list."""
    from hub_mpq.cli import app
    from hub_mpq.core.limit import RESERVED

    beside = [HubMPQ.search, HubMPQ.quantize, HubMPQ.pareto, HubMPQ.check_reachable, MPQConfig.__init__]
    names = {name for function in (*beside, Budget.__init__, Budget.of) for name in signature(function).parameters}
    for command in get_command(app).commands.values():
        if not any(option.name == "bitops" for option in command.params):
            continue
        for option in command.params:
            names |= {option.name, *(flag.lstrip("-").replace("-", "_") for flag in option.opts if flag[:2] == "--")}
    assert names - set(limits.names()) - RESERVED == set()


@dataclass
class Named:
    name: str


@pytest.mark.parametrize(
    ("register", "registry", "sort", "known"),
    [
        (register_task, tasks, "task", "classification, .*mine"),
        (register_runtime, runtimes, "runtime", "torch, .*mine"),
    ],
)
def test_tasks_and_runtimes_are_found_by_name(register, registry, sort, known):
    mine = register(Named("mine"))
    try:
        assert registry.get("mine") is mine
        with pytest.raises(InvalidArgument, match=f"unknown {sort} 'yours'; choose from {known}"):
            registry.get("yours")
        with pytest.raises(InvalidArgument, match=f"{sort} 'mine' is already registered"):
            register(type("Other", (), {"name": "mine"})())
    finally:
        registry.unregister("mine")
    assert "mine" not in registry


def test_all_public_names_are_there():
    asked = (
        "HubMPQ Budget Candidates Indicators LayerBits LayerGraph LayerKind Library Limit Policy Runtime SearchResult "
        "SearchStrategy Task Engine solve_table HubMPQError MPQConfig"
    )
    registering = [f"register_{sort}" for sort in ("limit", "layer_kind", "library", "task", "runtime", "strategy")]
    for name in [*asked.split(), *registering]:
        assert name in dir(hub_mpq)
        assert getattr(hub_mpq, name) is not None


def test_the_example_of_a_limit_in_its_docstring_works():
    """The lines a user would paste, on a real model's graph."""
    text = Path(hub_mpq.core.limit.__file__).read_text()
    lines = [line.strip()[4:] for line in text.splitlines() if line.strip().startswith((">>> @", "... "))]
    scope = {"register_limit": register_limit, "Limit": Limit}
    try:
        exec("\n".join(lines), scope)  # noqa: S102
        mpq = HubMPQ.from_module(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)), X[:1])
        mpq.train_indicators([X], steps=0)
        assert mpq.search(energy=1e-5).usage["energy"] <= 1e-5
    finally:
        limits.unregister("energy")
