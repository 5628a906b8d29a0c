"""A latency as a limit: the table, the searches that meet it, what is refused. No test looks at a wall clock."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
from dataclasses import replace

import pytest
import torch
from runtime_toys import bert, quantized, tokens
from torch import nn

import hub_mpq
from hub_mpq import Budget, HubMPQ, HubMPQError, read_latency_table, write_latency_table
from hub_mpq.core import (
    LatencyTable,
    LayerBits,
    LayerGraph,
    LayerSpec,
    Policy,
    Runtime,
    RuntimeLayers,
    human_seconds,
    parse_seconds,
    runtimes,
)
from hub_mpq.errors import InfeasibleBudget, InvalidArgument
from hub_mpq.nn.quantize import quantized_layers
from hub_mpq.runtime import Timing, check_table, meet_latency, timing
from hub_mpq.runtime.bench import bench_runtime, float_network
from hub_mpq.runtime.latency import PAIRS, policy_latency
from hub_mpq.runtime.machine import machine
from hub_mpq.search.policy_search import pareto_front, search_policy, usage_of

WIDTHS = (2, 4, 8)


def toy():
    layers = [LayerSpec("stem", "conv2d", (4, 3, 3, 3), 1000, 108, 64, fixed=LayerBits(8, 8))]
    layers += [LayerSpec(f"body.{i}", "linear", (100, 5), 5000 * (i + 1), 500, 50) for i in range(3)]
    return LayerGraph("toy", None, "module", (3, 8, 8), tuple(layers))


def table_of(graph, **changes):
    """Entries that do not grow with the widths alone, so that the solver has to look at them."""
    entries = {}
    for i, layer in enumerate(graph):
        row = {str(b): 1e-4 * (1 + (7 * b.weight + 3 * b.activation + 5 * i) % 11) for b in PAIRS}
        entries[layer.name] = {**row, "float": 2e-3}
    known = {"model": graph.model_id, "graph_digest": graph.digest, "input_shape": graph.input_shape}
    known |= {"machine": machine(), "runtime": "onednn", "engine": "torch", "batch_size": 1, "threads": 1}
    known |= {"entries": entries, "constant": 1e-3, "factor": 1.0, "float_factor": 1.0, "whole": 5e-3}
    known |= {"whole_float": 9e-3, "float_model": 9e-3, "date": "2026-11-28", "hub_mpq": "0"}
    return LatencyTable(**{**known, **changes})


def scores_of(graph):
    return {
        x.name: {LayerBits(w, a): (i + 1) * 4.0**-w + 4.0**-a for w in WIDTHS for a in WIDTHS}
        for i, x in enumerate(graph.searched)
    }


def seconds_of(table, policy):
    return table.constant + sum(table.entries[name][str(bits)] for name, bits in policy.bits.items())


@pytest.mark.parametrize(
    ("text", "seconds"), [("5ms", 5e-3), ("1.5 us", 1.5e-6), ("20ns", 2e-8), ("2s", 2.0), ("3 MS", 3e-3), (0.25, 0.25)]
)
def test_units(text, seconds):
    assert parse_seconds(text) == pytest.approx(seconds, rel=1e-12)


@pytest.mark.parametrize("text", ["5", "5 min", "-1ms", "0s", "ms", float("nan"), True, "W4A4"])
def test_what_is_no_time(text):
    with pytest.raises(InvalidArgument, match="latency"):
        Budget(latency=text, latency_table=table_of(toy()))


def test_times_for_people():
    assert [human_seconds(x) for x in (0.00512, 2.0, 1.5e-4, 3e-8)] == ["5.12 ms", "2 s", "150 us", "30 ns"]


@pytest.mark.parametrize("cap", [1.9e-3, 2.5e-3, 4e-3])
def test_the_solver_meets_the_table(cap):
    graph = toy()
    table, scores, names = table_of(graph), scores_of(graph), [x.name for x in graph.searched]
    result = search_policy(graph, scores, Budget(latency=cap, latency_table=table), base_bytes=0)
    best = float("inf")
    for combo in itertools.product(*(scores[n] for n in names)):
        policy = Policy({"stem": LayerBits(8, 8), **dict(zip(names, combo, strict=True))}, graph.digest)
        if seconds_of(table, policy) <= cap * (1 + 1e-9):
            best = min(best, sum(scores[n][b] for n, b in zip(names, combo, strict=True)))
    assert result.objective == pytest.approx(best, rel=1e-12)
    assert result.usage["latency"] == pytest.approx(seconds_of(table, result.policy), rel=1e-12)
    assert result.usage["latency"] <= cap * (1 + 1e-9)


def test_float_inputs_and_groups_take_the_time_of_float():
    graph = toy()
    table = table_of(graph)
    for level in ("W4A32", "W4g8A32", "W4g8A4"):
        assert table.seconds("body.1", LayerBits.parse(level)) == 2e-3
    assert table.seconds("elsewhere", LayerBits(4, 4)) == 0


def test_widths_that_were_not_timed_are_refused():
    graph = toy()
    table = table_of(graph)
    fewer = {name: {k: x for k, x in row.items() if k != "W4A4"} for name, row in table.entries.items()}
    with pytest.raises(InvalidArgument, match="W4A4"):
        search_policy(
            graph, scores_of(graph), Budget(latency="4ms", latency_table=replace(table, entries=fewer)), base_bytes=0
        )


def test_least_reachable_is_told_in_whole_model_terms():
    graph = toy()
    table, scores = table_of(graph), scores_of(graph)
    least = table.constant + table.entries["stem"]["W8A8"]
    least += sum(min(table.entries[name][str(b)] for b in row) for name, row in scores.items())
    with pytest.raises(InfeasibleBudget) as error:
        search_policy(graph, scores, Budget(latency="1us", latency_table=table), base_bytes=0)
    assert error.value.least["latency"] == pytest.approx(least, rel=1e-9)


def test_latency_without_a_table_names_the_command_that_makes_it():
    with pytest.raises(InvalidArgument, match=r"hub-mpq bench MODEL --runtime R -o table\.json"):
        Budget(latency="5ms")
    with pytest.raises(InvalidArgument, match="hub-mpq bench"):
        pareto_front(toy(), scores_of(toy()), limit="latency", points=3, base_bytes=0)


def test_a_table_alone_limits_nothing():
    graph = toy()
    with pytest.raises(InvalidArgument, match="latency_table needs a limit"):
        search_policy(graph, scores_of(graph), Budget(latency_table=table_of(graph)), base_bytes=0)
    other = search_policy(graph, scores_of(graph), Budget(bitops="W4A4", latency_table=table_of(graph)), base_bytes=0)
    assert other.usage["latency"] > 0  # beside another limit it tells what a policy takes


def test_a_budget_keeps_its_table():
    table = table_of(toy())
    budget = Budget(latency="5ms", bitops="W4A4", latency_table=table)
    kept = [budget.replaced("bitops", "W3A3"), budget.with_groups(32), Budget.of(budget, {"size": "1MB"})]
    kept += [copy.deepcopy(budget), pickle.loads(pickle.dumps(budget))]  # noqa: S301 (its own)
    for other in kept:
        assert other.latency_table == table
        assert other.limits["latency"] == 5e-3
    assert Budget.of(None, {"latency": None, "latency_table": None}) is None
    with pytest.raises(InvalidArgument, match="latency_table"):
        Budget(latency="5ms", latency_table=3)


def test_without_a_table_usage_says_nothing_of_latency():
    graph = toy()
    assert "latency" not in usage_of(graph, Policy.uniform(graph, "W4A4"), None, 0).amounts


def test_a_front_over_latency(tmp_path):
    graph = toy()
    others = Budget(latency_table=table_of(graph))
    front = pareto_front(graph, scores_of(graph), limit="latency", points=6, base_bytes=0, others=others)
    times, objectives = [r.usage["latency"] for r in front], [r.objective for r in front]
    assert len(front) > 2
    assert times == sorted(times)
    assert objectives == sorted(objectives, reverse=True)
    pytest.importorskip("matplotlib")
    from hub_mpq.plot import plot_pareto

    plot_pareto({"toy": front}, tmp_path / "front.svg", x="latency")
    assert "latency of one call" in (tmp_path / "front.svg").read_text()


# a table of something else


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"graph_digest": "0" * 64}, "layers differ from those"),
        ({"entries": {"ghost": {"float": 1e-3}}}, "names layer 'ghost', which 'toy' does not have"),
        ({"input_shape": (3, 16, 16)}, "inputs of 3×16×16, but the model reads 3×8×8"),
        ({"machine": "another CPU, 64 cores, AVX2"}, "another machine .another CPU"),
    ],
)
def test_a_table_of_something_else_is_refused_with_the_command(changes, words):
    graph = toy()
    table = table_of(graph, batch_size=8, threads=2, **changes)
    with pytest.raises(InvalidArgument, match=words) as error:
        check_table(table, graph)
    size = " --input-size 3x8x8" if "input_shape" in changes else ""
    assert f"hub-mpq bench toy --runtime onednn --batch-size 8 --threads 2{size} -o table.json" in str(error.value)


def test_a_table_of_another_runtime_than_the_targets_is_refused():
    graph = toy()
    check_table(table_of(graph), graph, "onednn")
    check_table(table_of(graph), graph, "gguf")
    with pytest.raises(InvalidArgument, match="bench toy --runtime torch"):
        check_table(table_of(graph), graph, "torch")


def test_every_search_refuses_a_table_of_another_machine(net):
    mpq = HubMPQ.from_module(net, torch.zeros(1, 1, 8, 8))
    mpq.scores = mpq.train_scores([torch.randn(4, 1, 8, 8)], strategy="mse")
    wrong = table_of(mpq.graph, machine="another CPU")
    more = {"latency": "5ms", "latency_table": wrong}
    for search in (mpq.search, mpq.check_reachable, mpq.quantize):
        with pytest.raises(InvalidArgument, match="another CPU"):
            search(**more)
    with pytest.raises(InvalidArgument, match="another CPU"):
        mpq.pareto("latency", latency_table=wrong)
    assert len(mpq.pareto("latency", latency_table=table_of(mpq.graph))) > 1


# the file


def test_a_table_comes_back_from_its_file(tmp_path):
    table = table_of(toy())
    write_latency_table(tmp_path / "t.json", table)
    assert read_latency_table(tmp_path / "t.json") == table
    assert Budget(latency="5ms", latency_table=tmp_path / "t.json").latency_table == table
    assert Budget(latency="5ms", latency_table=str(tmp_path / "t.json")).latency_table == table
    assert json.loads((tmp_path / "t.json").read_text())["entries"]["stem"]["float"] == 2e-3


def changed(**changes):
    return json.dumps({**table_of(toy()).to_dict(), **changes})


def entries(**row):
    return changed(entries={"stem": {"float": 1e-3, "W4A4": 1e-3, **row}})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "{",
        "[" * 100_000,
        '{"model": "a", "model": "b"}',
        changed(extra=1),
        changed(model=3),
        changed(batch_size=True),
        changed(batch_size=0),
        changed(batch_size=10**30),
        changed(threads="1"),
        changed(threads=10**9),
        changed(input_shape="3x8x8"),
        changed(input_shape=[3, -8]),
        changed(constant=-1e-9),
        changed(constant="1"),
        changed(factor=0),
        changed(whole=None),
        changed(whole=10**400),
        changed(entries=[]),
        changed(entries={}, constant=0),
        changed(entries={"stem": {"W4A4": 1e-3}}),
        changed(entries={"stem": 1e-3}),
        entries(W4A4=-1.0),
        entries(W4A4=float("nan")),
        entries(W4A4=float("inf")),
        entries(W4A4="1"),
        entries(W4A4=True),
        entries(W4A4=10**400),
        entries(W9A4=1.0),
        entries(int8=1.0),
        entries(W4A4=1.0).replace("1.0", "1e999"),
    ],
)
def test_a_hostile_file_is_one_sentence(tmp_path, text):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(HubMPQError, match=r"t\.json") as error:
        Budget(latency="5ms", latency_table=tmp_path / "t.json")
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there(tmp_path):
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    for name in ("none.json", "", "binary.json"):
        with pytest.raises(HubMPQError):
            Budget(latency="5ms", latency_table=tmp_path / name)


# the whole model corrects the table


def met(measure, cap=4e-3, **table):
    graph = toy()
    budget = Budget(latency=cap, latency_table=table_of(graph, **table))
    return meet_latency(lambda b: search_policy(graph, scores_of(graph), b, base_bytes=0), budget, measure)


def times(factor, calls=None):
    table = table_of(toy())

    def measure(policy):
        if calls is not None:
            calls.append(policy)
        return Timing(factor * seconds_of(table, policy), 0.0, 9)

    return measure


def test_a_sum_that_is_right_needs_one_search():
    found = met(times(1.0))
    assert found.searches == 1
    assert found.predicted == found.timing.seconds <= 4e-3


@pytest.mark.parametrize("factor", [0.5, 0.8, 1.3, 1.6])
def test_a_sum_that_is_wrong_is_corrected_both_ways(factor):
    """The policy is the best one of those whose real time is within the limit."""
    calls, graph = [], toy()
    found = met(times(factor, calls))
    real = Budget(latency=4e-3, latency_table=table_of(graph).times(factor))
    assert found.result.policy == search_policy(graph, scores_of(graph), real, base_bytes=0).policy
    assert found.timing.seconds <= 4e-3
    assert found.searches == len(calls) == 2
    assert found.predicted == pytest.approx(found.timing.seconds, rel=1e-9)
    assert found.budget.latency_table.factor == pytest.approx(factor, rel=1e-9)


def test_a_policy_that_misses_the_limit_is_never_returned():
    """The time does not follow the table at all: the searches end, and tell the least that was reached."""
    seconds = iter([6e-3, 5e-3, 4.5e-3, 4.4e-3, 1e-3])
    with pytest.raises(HubMPQError, match=r"latency 4 ms; the minimum measured is .* ms ± 0 ns on .*onednn"):
        met(lambda policy: Timing(next(seconds), 0.0, 9))
    with pytest.raises(HubMPQError, match=r"the minimum measured is 40 ms") as error:
        met(lambda policy: Timing(4e-2, 0.0, 9))
    assert not isinstance(error.value, InfeasibleBudget)


def test_the_last_policy_that_met_the_limit_is_kept():
    """The time left after a correction downwards buys a policy that turns out too slow."""
    seconds = iter([2e-3, 4.5e-3, 4.5e-3, 4.5e-3])
    found = met(lambda policy: Timing(next(seconds), 0.0, 9))
    assert found.timing.seconds == 2e-3
    assert found.searches > 1


def test_the_spread_of_a_measurement_counts():
    exact = times(1.0)
    cap = exact(met(exact).result.policy).seconds

    def slower(policy):
        return Timing(1.02 * exact(policy).seconds, 0.03 * exact(policy).seconds, 9)

    assert met(slower, cap=cap).timing.seconds == pytest.approx(1.02 * cap)


def test_a_wide_spread_excuses_no_miss():
    """Each time is 5 % above the limit, whatever the policy, and scatters by 50 %."""
    with pytest.raises(HubMPQError, match=r"the minimum measured is 4\.2 ms ± 2 ms"):
        met(lambda policy: Timing(4.2e-3, 2e-3, 9))


def test_what_is_searched_next_has_the_policy_that_met():
    """The limit is the least time of the table, and the measured time is above it by less than its spread."""
    graph = toy()
    table, scores = table_of(graph), scores_of(graph)
    least = table.constant + sum(min(table.entries[x.name][str(b)] for b in scores[x.name]) for x in graph.searched)
    cap = (least + table.entries["stem"]["W8A8"]) * (1 + 1e-9)
    exact = times(1.0)
    found = met(lambda policy: Timing(1.02 * exact(policy).seconds, 0.03 * cap, 9), cap=cap)
    assert search_policy(graph, scores, found.budget, base_bytes=0).policy == found.result.policy


def test_a_budget_below_the_table_is_infeasible_at_once():
    def never(policy):
        raise AssertionError("nothing was to be measured")

    with pytest.raises(InfeasibleBudget):
        met(never, cap=1e-6)


# measured on a clock that a runtime of the test turns


class Clock:
    now = 0.0

    def __call__(self):
        self.now += 1e-9
        return self.now


class Ticking(Runtime):
    """Computes in float and turns the clock by what each layer would take; the whole takes more than its layers."""

    name = "ticking"
    time_by_width = True

    def __init__(self, clock, whole=1.25, beside=1e-3):
        self.clock, self.whole, self.beside = clock, whole, beside
        self.built = 0

    def menu(self, layer):
        return tuple(b for b in PAIRS if b.weight * b.activation <= 36) if layer.kind == "conv2d" else ()

    def seconds(self, module):
        inputs = module.input_quantizer
        if not isinstance(module, nn.Conv2d):
            return 0.0
        bits = module.weight_quantizer.widths[0], 32 if inputs is None else inputs.widths[0]
        product = bits[0] * bits[1]
        return 1e-6 * module.out_channels * (product if product <= 36 else 50)

    def build(self, model, example):
        self.built += 1
        layers = [self.seconds(module) for _, module in quantized_layers(model)]
        takes = self.whole * sum(layers) + self.beside if len(layers) > 1 else sum(layers)

        class Turning(nn.Module):
            def forward(self, *args, **kwargs):
                clock.now += takes
                return model(*args, **kwargs)

        clock = self.clock
        return Turning().eval(), RuntimeLayers(self.name, tuple(n for n, _ in quantized_layers(model)))

    def observe(self, module, batch):
        return ()


@pytest.fixture
def ticking(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing, "clock", clock)
    monkeypatch.setattr(timing, "COUNT", 0.0)  # one call a count
    monkeypatch.setattr(timing, "MOST", timing.LEAST)
    runtime = Ticking(clock)
    from hub_mpq.core import register_runtime

    register_runtime(runtime)
    yield runtime
    runtimes.unregister("ticking")


@pytest.mark.parametrize(("whole", "beside"), [(1.25, 1e-3), (0.8, 0.0)])
def test_each_width_is_timed_where_it_has_a_time_of_its_own(net, ticking, whole, beside):
    """The whole takes more than its layers, or less."""
    ticking.whole, ticking.beside = whole, beside
    mpq = HubMPQ.from_module(net, torch.randn(1, 1, 8, 8))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    threads = torch.get_num_threads()
    table = mpq.measure_latency("ticking", batch_size=2, threads=2)
    assert torch.get_num_threads() == threads
    assert (table.batch_size, table.threads, table.runtime, table.machine) == (2, 2, "ticking", machine())
    assert set(table.entries) == {"0", "3", "6", "9"}  # the linear layer is a part of the constant
    for name, row in table.entries.items():
        assert set(row) == {"float", *map(str, PAIRS)}
        channels = net[int(name)].out_channels
        for bits in PAIRS:
            inside = bits.weight * bits.activation <= 36
            one = 1e-6 * channels * (bits.weight * bits.activation if inside else 50)
            assert row[str(bits)] == pytest.approx(one * (table.factor if inside else table.float_factor), rel=1e-3)
        assert row["float"] == row["W8A8"]
    assert (table.constant > 0) == (whole > 1)
    assert whole > 1 or table.factor == pytest.approx(whole, rel=1e-3)
    widest = sum(row["W6A6"] for row in table.entries.values())
    assert table.constant + widest == pytest.approx(table.whole, rel=1e-9)
    floats = sum(row["float"] for row in table.entries.values())
    assert table.constant + floats == pytest.approx(table.whole_float, rel=1e-9)
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_equal_layers_are_timed_once(ticking):
    net = nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1) for _ in range(5))).eval()
    mpq = HubMPQ.from_module(net, torch.randn(1, 4, 8, 8), fixed={"*": None})
    mpq.measure_latency("ticking", candidates=[2, 4])
    # two signs of the input at most; 4 pairs and float of each; the whole twice
    assert ticking.built <= 2 * 5 + 2


def test_candidates_and_fixed_widths_are_what_is_timed(net, ticking):
    mpq = HubMPQ.from_module(net, torch.randn(1, 1, 8, 8), fixed={"0": "W3A3"})
    row = mpq.measure_latency("ticking", candidates=[2, 4]).entries["3"]
    inside = {k for k in row if k != "float" and LayerBits.parse(k) in ticking.menu(mpq.graph["3"])}
    assert inside == {"W2A2", "W2A4", "W4A2", "W4A4", "W3A3"}


def test_one_kernel_for_all_widths_is_timed_once(net, ticking):
    ticking.time_by_width = False
    mpq = HubMPQ.from_module(net, torch.randn(1, 1, 8, 8))
    row = mpq.measure_latency("ticking").entries["3"]
    assert row["W1A1"] == row["W6A6"] == row["W4A8"]
    assert row["W8A8"] == row["float"] != row["W6A6"]
    assert ticking.built == 2 * 4 + 2


@pytest.mark.parametrize("part", [0.2, 0.5, 0.8])
def test_quantize_meets_the_measured_whole(net, train, ticking, tmp_path, part):
    mpq = HubMPQ.from_module(net, torch.randn(1, 1, 8, 8))
    table = mpq.measure_latency("ticking")
    graph = mpq.graph

    def real(level):
        policy = Policy.uniform(graph, level)
        return policy_latency(net, graph, table, torch.randn(1, 1, 8, 8), policy).seconds

    low, high = real("W2A2"), real("W6A6")
    cap = low + part * (high - low)
    skewed = replace(table.times(1.2), constant=0.5 * table.constant)
    mpq.quantize(latency=cap, latency_table=skewed, train=train, strategy="mse", epochs=0, validate=False)
    facts = mpq.history["latency"]
    ours = policy_latency(net, graph, table, torch.randn(1, 1, 8, 8), mpq.policy).seconds
    assert facts["measured"] == pytest.approx(ours, rel=1e-3)
    assert facts["measured"] - facts["spread"] <= cap
    assert facts["measured"] >= 0.8 * cap
    assert facts["predicted"] == pytest.approx(facts["measured"], rel=0.05)
    assert facts["searches"] <= 8
    assert (facts["limit"], facts["runtime"], facts["batch_size"], facts["threads"]) == (cap, "ticking", 1, 1)
    assert f"latency: {human_seconds(facts['measured'])} ±" in mpq.report()
    assert f"limit {human_seconds(cap)}" in mpq.report()
    assert mpq.result.usage["latency"] == facts["predicted"]
    mpq.save_pretrained(tmp_path / "m")
    again = HubMPQ.from_pretrained(tmp_path / "m", module=copy.deepcopy(net))
    assert again.history["latency"] == facts
    assert "latency: " in again.report()


def test_quantize_returns_no_policy_that_misses(net, train, ticking):
    """The runtime has become slower than the table says by far."""
    mpq = HubMPQ.from_module(net, torch.randn(1, 1, 8, 8))
    table = mpq.measure_latency("ticking")
    ticking.beside = 1.0
    with pytest.raises(HubMPQError, match=r"minimum measured is 1\.0\d+ s"):
        mpq.quantize(latency=table.whole, latency_table=table, train=train, strategy="mse", epochs=0, validate=False)
    assert mpq.policy is None


def test_measured_candidates_of_validation_are_within_the_limit_too(net, train, ticking):
    mpq = HubMPQ.from_module(net, torch.randn(1, 1, 8, 8))
    table = mpq.measure_latency("ticking")
    cap = 0.7 * table.whole
    batches = [x for x, _ in train]
    mpq.quantize(latency=cap, latency_table=table, train=train, strategy="mse", epochs=0, validate=batches)
    assert mpq.result.measurements
    assert mpq.history["latency"]["measured"] <= cap * (1 + 1e-6)


def test_a_runtime_that_is_not_here_costs_no_training(net, train, ticking, monkeypatch):
    mpq = HubMPQ.from_module(net, torch.randn(1, 1, 8, 8))
    table = mpq.measure_latency("ticking")
    monkeypatch.setattr(type(ticking), "available", lambda self: "not here")
    with pytest.raises(HubMPQError, match="runtime 'ticking' is not available: not here"):
        mpq.quantize(latency=1.0, latency_table=table, train=train, strategy="mse", epochs=0, validate=False)
    assert mpq.scores is None


def test_an_example_of_several_samples_is_timed_at_the_batch_that_is_told():
    def batch(example, size):
        return [x.tolist() for x in timing.batch_of(example, size)]

    x, mask = torch.arange(4.0), torch.ones(2)
    assert batch((x, x + 1, mask), 1) == [[0.0], [1.0], [1.0, 1.0]]
    assert batch((x[:1], mask), 3) == [[0.0] * 3, [1.0, 1.0]]
    assert timing.batch_of({"x": x}, 2)["x"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    "more", [{"batch_size": 0}, {"threads": 10**9}, {"threads": 1.5}, {"threads": True}, {"runtime": "none"}]
)
def test_what_cannot_be_measured(net, more):
    with pytest.raises(InvalidArgument):
        HubMPQ.from_module(net, torch.randn(1, 1, 8, 8)).measure_latency(**more)


def test_a_packed_model_has_no_float_layers_to_time(net, tmp_path):
    mpq = HubMPQ.from_module(net, torch.randn(1, 1, 8, 8)).apply_policy("W4A4", [torch.randn(4, 1, 8, 8)])
    mpq.save_pretrained(tmp_path / "m")
    with pytest.raises(HubMPQError, match="float weights"):
        HubMPQ.from_pretrained(tmp_path / "m", module=copy.deepcopy(net)).measure_latency()


# on a real runtime


needs_onednn = pytest.mark.skipif(runtimes.get("onednn").available() is not None, reason="no onednn here")


@needs_onednn
def test_a_table_on_onednn(net, tmp_path):
    mpq = HubMPQ.from_module(net, torch.randn(1, 1, 8, 8))
    table = mpq.measure_latency(batch_size=3)
    assert set(table.entries) == {"0", "3", "6", "9", "13"}
    for layer in mpq.graph:
        menu = runtimes.get("onednn").menu(layer)
        row = table.entries[layer.name]
        assert len({row[str(bits)] for bits in menu}) == 1
        assert {row[str(bits)] for bits in PAIRS if bits not in menu} <= {row["float"]}
    assert table.engine.startswith("torch ")
    write_latency_table(tmp_path / "t.json", table)
    assert read_latency_table(tmp_path / "t.json") == table
    assert isinstance(table, hub_mpq.LatencyTable)


@needs_onednn
def test_a_model_of_tokens_is_timed():
    mpq = HubMPQ.from_module(bert(), {k: v[:1] for k, v in tokens().items()})
    table = mpq.measure_latency(batch_size=2)
    assert "classifier" in table.entries
    assert not any("embeddings" in name for name in table.entries)
    assert table.seconds("bert.embeddings.word_embeddings", LayerBits(8, 32)) == 0


def test_the_float_network_has_no_quantizers(net):
    x = torch.randn(4, 1, 8, 8)
    mpq = quantized(net, "W4A32", x, fixed={"*": None})
    plain = float_network(mpq.model)
    assert not list(quantized_layers(plain))
    assert [type(module) for module in plain.modules()] == [type(module) for module in net.modules()]
    with torch.no_grad():
        assert torch.equal(plain(x), mpq.model(x))
    assert list(quantized_layers(mpq.model))


@needs_onednn
def test_bench_of_a_quantized_model(net):
    mpq = quantized(net, "W4A4", torch.randn(4, 1, 8, 8))
    found = bench_runtime(mpq.model, "onednn", mpq.source.example, batch_size=2)
    assert found.certificate.exact
    assert {*found.layers.integer, *found.layers.float} == {"0", "3", "6", "9", "13"}
    tree = json.loads(json.dumps(found.to_json()))
    assert tree["speedup"] == pytest.approx(tree["float"]["seconds"] / tree["runtime"]["seconds"])
    sizes = {name: module.weight.numel() for name, module in quantized_layers(mpq.model)}
    biases = {name: len(module.bias) for name, module in quantized_layers(mpq.model)}
    integer = found.layers.integer
    assert tree["float_nbytes"] == sum(4 * sizes[n] + 4 * biases[n] for n in integer)
    assert tree["integer_nbytes"] == sum(sizes[n] + 8 * biases[n] for n in integer)
