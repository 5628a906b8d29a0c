"""Options and pins of one call: typos are named, dataclasses and mappings are alike, nothing outlives the call."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch

from hub_mpq import (
    Budget,
    Engine,
    FinetuneOptions,
    HubMPQ,
    IndicatorOptions,
    Indicators,
    LayerBits,
    MPQConfig,
    Policy,
)
from hub_mpq.core import human
from hub_mpq.cost import graph_bitops
from hub_mpq.errors import HubMPQError, InfeasibleBudget, InvalidArgument
from hub_mpq.pack import read_indicators, write_indicators

X = torch.zeros(1, 1, 8, 8)
STRATEGIES = ("limpq", "dq", "ebs", "seam", "bsq", "gradient", "hessian", "mse", "kl")


@pytest.fixture
def mpq(net, train):
    out = HubMPQ.from_module(net, X)
    out.train_indicators(train, steps=0)
    return out


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda mpq, train: mpq.search(bitop="W4A4"), "unknown option or limit 'bitop'; did you mean 'bitops'"),
        (lambda mpq, train: mpq.search({"bitop": "W4A4"}), "'bitop'"),
        (lambda mpq, train: mpq.search("W4A4"), "budget must be a Budget or a mapping"),
        (lambda mpq, train: mpq.search(), "no budget given"),
        (lambda mpq, train: mpq.pareto("bitops", 3, sise="W4"), "'sise'"),
        (lambda mpq, train: mpq.check_reachable(bitops="W4A4", candidate=[2]), "'candidate'"),
        (lambda mpq, train: mpq.quantize(bitops="W4A4", epoch=3), "'epoch'"),
        (lambda mpq, train: mpq.train_indicators(train, step=3), "no option 'step'; did you mean 'steps'"),
        (lambda mpq, train: mpq.train_indicators(train, {"presets": "authors"}), "did you mean 'preset'"),
        (lambda mpq, train: mpq.train_scores(train, strategy="mse", freeze_weights=True), "of strategy 'limpq'"),
        (lambda mpq, train: mpq.train_scores(train, strategy="mse", strategy_options={"batchs": 1}), "'batchs'"),
        (lambda mpq, train: mpq.apply_policy("W4A4", train).finetune(train, lrr=1), "did you mean 'lr'"),
        (lambda mpq, train: mpq.apply_policy("W4A4", train).finetune(train, 3), "FinetuneOptions or a mapping"),
        (lambda mpq, train: Engine.of({"fb16": True}), "did you mean 'bf16'"),
        (lambda mpq, train: MPQConfig(bitsops="W4A8"), "'bitsops'"),
        (lambda mpq, train: MPQConfig("W4A8", per_chanel=False), "'per_chanel'"),
    ],
)
def test_a_typo_is_named(mpq, train, call, words):
    with pytest.raises(InvalidArgument, match=words):
        call(mpq, train)


def test_a_dataclass_a_mapping_and_keywords_say_the_same(mpq, train):
    budget = Budget(bitops="W3A3")
    found = [mpq.search(budget), mpq.search({"bitops": "W3A3"}), mpq.search(bitops="W3A3")]
    assert len({str(x.policy.to_dict()) for x in found}) == 1
    assert mpq.search(budget, size="W4").details["budget"] == "bitops W3A3, size W4"
    logs = []
    for options, changes in ((FinetuneOptions(steps=2, lr=1e-3), {}), ({"steps": 2}, {"lr": 1e-3}), (None, None)):
        mpq.apply_policy("W4A4", train)
        logs.append(mpq.finetune(train, options, **({"steps": 2, "lr": 1e-3} if changes is None else changes)))
        assert mpq.history["finetune"] == {"steps": 2, "lr": 1e-3, "samples": 32}
    assert len({str(log.epoch_loss) for log in logs}) == 1
    rows = [
        mpq.train_indicators(train, IndicatorOptions(steps=1, seed=3)),
        mpq.train_indicators(train, steps=1, seed=3),
    ]
    assert rows[0].weight == rows[1].weight


def test_options_that_are_set_win_over_those_of_the_whole_call(mpq, train):
    mpq.quantize(bitops="W4A4", train=train, epochs=5, seed=7, finetune_options={"steps": 1})
    assert mpq.history["finetune"] == {"steps": 1, "samples": 16, "epochs": 5, "seed": 7}
    mpq.quantize(bitops="W4A4", train=train, seed=7, finetune_options={"steps": 1, "seed": 0})  # the default, asked for
    assert mpq.history["finetune"] == {"steps": 1, "samples": 16}


def test_pins_hold_for_one_call(net, train):
    mpq = HubMPQ.from_module(net, X)
    free = [x.name for x in mpq.graph.searched]
    pins = {"3": "W7A7"}

    def searched():
        return [x.name for x in mpq.graph.searched]

    mpq.train_indicators(train, steps=0, fixed=pins)
    assert searched() == free
    mpq.train_scores(train, strategy="mse", fixed=pins)
    assert searched() == free
    mpq.train_indicators(train, steps=0)
    assert mpq.search(bitops="W4A4", fixed=pins).policy.bits["3"] == LayerBits(7, 7)
    assert mpq.search(bitops="W2A2").policy.bits["3"] == LayerBits(2, 2)
    mpq.check_reachable(bitops="W4A4", fixed=pins)
    assert searched() == free


def test_a_policy_remembers_the_pins_it_was_searched_with(net, train, tmp_path):
    mpq = HubMPQ.from_module(net, X)
    mpq.quantize(bitops="W3A3", train=train, epochs=0, indicator_options={"steps": 0}, fixed={"3": "W7A7"})
    assert "pinned W7A7" in mpq.report()
    pinned = mpq.graph.with_fixed({"3": "W7A7"})
    allowed = f"(budget W3A3: {human(graph_bitops(pinned, Policy.uniform(pinned, 'W3A3')))})"
    assert allowed in mpq.report()
    usage = dict(mpq.usage().amounts)
    mpq.save_pretrained(tmp_path)
    again = HubMPQ.from_pretrained(tmp_path, module=copy.deepcopy(net))
    assert again.graph["3"].fixed == LayerBits(7, 7)
    assert allowed in again.report()
    assert dict(again.usage().amounts) == usage
    assert mpq.graph["3"].fixed is None
    mpq.quantize(bitops="W3A3", train=train, epochs=0)
    assert mpq.policy.bits["3"].weight < 7


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_scores_of_every_strategy_are_stored_with_their_unit_and_serve_again(net, train, strategy, tmp_path):
    mpq = HubMPQ.from_module(copy.deepcopy(net), X)
    options = {"proxy": 0.5, "per_class": 4} if strategy == "seam" else None
    found = mpq.train_scores(train, strategy=strategy, strategy_options=options, steps=1, budget={"bitops": "W3A3"})
    assert found is mpq.scores
    assert found.strategy == strategy
    assert found.unit
    best = mpq.search(bitops="W3A3")
    mpq.apply_policy(best.policy, train).save_pretrained(tmp_path / "out")
    again = HubMPQ.from_pretrained(tmp_path / "out", module=copy.deepcopy(net))
    assert again.scores == found
    assert (again.search(bitops="W3A3").policy, again.scores.inferred) == (best.policy, found.inferred)
    fresh = HubMPQ.from_module(copy.deepcopy(net), X)
    fresh.quantize(bitops="W3A3", train=train, epochs=0, indicators=again.scores)
    assert fresh.policy == best.policy


def test_a_file_of_scores_that_is_wrong_is_refused(mpq, tmp_path):
    found = replace(mpq.scores, pairs={"3": {LayerBits(2, 2): float("nan")}})
    with pytest.raises(InvalidArgument, match="pair/3"):
        write_indicators(tmp_path / "a.safetensors", found)
    wrongs = ({"sense": "best"}, {"seed": "x"}, {"seed": True}, {"inferred": {"3": "W99"}}, {"inferred": 3})
    for wrong in (*wrongs, {"strategy": 3}, {"strategy": "x" * 1000}, {"unit": {}}):
        bad = replace(mpq.scores, provenance={**mpq.scores.provenance, **wrong})
        write_indicators(tmp_path / "b.safetensors", bad)
        with pytest.raises(HubMPQError, match="provenance"):
            read_indicators(tmp_path / "b.safetensors")


def test_a_resumed_run_of_other_settings_learns_its_own_scores(net, make_net, train, tmp_path):
    """Whatever an earlier run with the same folder did, and for whatever network."""
    options = {"bitops": "W3A3", "train": train, "epochs": 0, "checkpoint_dir": tmp_path}
    first = HubMPQ.from_module(net, X).quantize(**options, indicator_options={"steps": 2})
    again = HubMPQ.from_module(net, X).quantize(**options, indicator_options={"steps": 1, "seed": 7}, resume=True)
    assert (again.scores.provenance["steps"], again.scores.seed) == (1, 7)
    other = HubMPQ.from_module(make_net(1), X).quantize(**options, indicator_options={"steps": 2}, resume=True)
    assert other.scores.weight != first.scores.weight


@pytest.mark.parametrize("fixed", [{"3": "W8A8"}, {"0": None, "13": None}, {"*": None}])
def test_a_size_holds_with_pins_of_the_call(net, train, fixed, tmp_path):
    """The bytes of what a call pins or frees are counted once: by the search, in usage, and on the disk."""
    mpq = HubMPQ.from_module(net, X)
    mpq.train_indicators(train, steps=0, fixed={"*": None})
    least = mpq.search(size="W2", fixed=fixed).usage["size"]
    fresh = HubMPQ.from_module(net, X)  # without scores it is asked of the candidates, of 2 bits and more too
    fresh.check_reachable(size=least, fixed=fixed)
    with pytest.raises(InfeasibleBudget):
        fresh.check_reachable(size=least - 1, fixed=fixed)
    cap = least + 300
    mpq.quantize(size=cap, train=train, epochs=0, fixed=fixed)
    assert dict(mpq.result.usage.amounts) == dict(mpq.usage().amounts)
    assert mpq.save_pretrained(tmp_path) == mpq.usage()["size"] <= cap


def test_a_policy_costs_what_it_says_whatever_the_graph_pins(net, train, tmp_path):
    mpq = HubMPQ.from_module(net, X)
    assert {x.name for x in mpq.graph if x.fixed is not None} == {"0", "13"}
    plain = Policy(dict.fromkeys(mpq.graph.names, LayerBits(4, 4)), mpq.graph.digest)
    free = HubMPQ.from_module(net, X, fixed={"*": None})
    usage = mpq.usage(plain)
    for name in ("bitops", "compression", "activation_memory", "activation_peak"):
        assert usage[name] == free.usage(plain)[name], name
    assert usage["bitops"] == graph_bitops(mpq.graph, plain)
    mpq.apply_policy(plain, train)
    assert mpq.save_pretrained(tmp_path) == mpq.usage()["size"] == usage["size"]
    again = HubMPQ.from_pretrained(tmp_path, module=copy.deepcopy(net))
    assert dict(again.usage().amounts) == dict(mpq.usage().amounts)
    assert again.graph["0"].fixed == LayerBits(4, 4)


def test_indicators_of_another_strategy_than_asked_are_refused(mpq, train):
    with pytest.raises(InvalidArgument, match="strategy='dq' does not match the indicators, made by 'limpq'"):
        mpq.quantize(bitops="W4A4", train=train, epochs=0, strategy="dq", indicators=mpq.scores)
    found = HubMPQ.from_module(mpq.float_model, X).train_scores(train, strategy="dq", steps=1)
    mpq.quantize(train=train, epochs=0, indicators=found)  # their widths, since no budget is named
    assert {n: b for n, b in mpq.policy.bits.items() if n in found.inferred} == found.inferred
    for wrong in ({"zzz": "W4A4"}, dict.fromkeys(found.pairs, "W32A4")):
        bad = replace(found, provenance={**found.provenance, "inferred": wrong})
        with pytest.raises(InvalidArgument, match="for another model"):
            mpq.quantize(train=train, epochs=0, indicators=bad)


def test_weights_alone_stay_alone_with_scores_of_pairs(net, train):
    pairs = {n: {LayerBits(2, 2): 2.0, LayerBits(4, 4): 1.0} for n in ("3", "6", "9")}
    mpq = HubMPQ.from_module(net, X, weight_only=True)
    mpq.scores = Indicators({}, {}, pairs=pairs, provenance={"strategy": "mine"})
    with pytest.raises(InvalidArgument, match="no score"):
        mpq.search(size="W4")
    mpq.scores = Indicators({}, {}, pairs={n: {**row, LayerBits(3, 32): 5.0} for n, row in pairs.items()})
    assert {str(mpq.search(size="W4").policy.bits[n]) for n in pairs} == {"W3A32"}


def test_a_layer_that_was_pinned_when_scores_were_made_is_named(net, train):
    mpq = HubMPQ.from_module(net, X)
    mpq.train_scores(train, strategy="mse", fixed={"3": "W8A8"})
    with pytest.raises(InvalidArgument, match="layer '3' has no score"):
        mpq.search(bitops="W4A4")
    assert mpq.pareto("bitops", 3, fixed={"3": "W8A8"})
    other = {f"other.{n}": scores for n, scores in mpq.scores.pairs.items()}
    mpq.scores = Indicators({}, {}, pairs=other, provenance=mpq.scores.provenance)
    with pytest.raises(InvalidArgument, match=r"has no score: the scores are of another model, with a layer 'other\."):
        mpq.search(bitops="W4A4")


@pytest.mark.parametrize(
    ("kind", "values", "words"),
    [
        (FinetuneOptions, {"steps": "3"}, "steps must be an integer or None, got '3'"),
        (FinetuneOptions, {"steps": 2.5}, "steps must be an integer"),
        (FinetuneOptions, {"epochs": float("nan")}, "epochs must be a number, got nan"),
        (FinetuneOptions, {"epochs": -1}, "epochs must be a number of at least 0, got -1"),
        (FinetuneOptions, {"lr": "x"}, "lr must be a number"),
        (FinetuneOptions, {"lr": -1}, "lr must be a number of at least 0"),
        (FinetuneOptions, {"smoothing": 5}, "smoothing must be a number from 0 to 1"),
        (FinetuneOptions, {"checkpoint_every": 0}, "checkpoint_every must be an integer of at least 1, got 0"),
        (IndicatorOptions, {"distill": 2}, "distill must be a number from 0 to 1"),
        (IndicatorOptions, {"uniform": "no"}, "uniform must be true or false"),
        (IndicatorOptions, {"seed": 1.5}, "seed must be an integer"),
        (IndicatorOptions, {"resume": "x"}, "resume must be true or false"),
        (IndicatorOptions, {"stepz": 3}, "did you mean 'steps'"),
        (Engine, {"bf61": True}, "did you mean 'bf16'"),
        (Engine, {"bf16": 1}, "bf16 must be true or false"),
    ],
)
def test_a_value_that_cannot_be_is_refused_where_it_is_written(kind, values, words):
    with pytest.raises(InvalidArgument, match=words):
        kind(**values)
    with pytest.raises(InvalidArgument, match=words):
        kind.of(values)


def test_an_engine_may_be_a_mapping(mpq, train):
    mpq.quantize(bitops="W4A4", train=train, steps=1, engine={"log_every": 5})
    with pytest.raises(InvalidArgument, match="options must be Engine or a mapping"):
        mpq.finetune(train, steps=1, engine=3)
    with pytest.raises(InvalidArgument, match="'fb16'"):
        mpq.train_indicators(train, steps=1, engine={"fb16": True})


def test_a_dataclass_means_what_a_mapping_means(mpq, train):
    for options in ({"epochs": 1, "seed": 0}, FinetuneOptions(epochs=1, seed=0)):
        mpq.quantize(bitops="W4A4", train=train, epochs=0, seed=5, finetune_options=options)
        assert mpq.history["finetune"]["steps"] == len(train)
        assert "seed" not in mpq.history["finetune"]
    mpq.quantize(bitops="W4A4", train=train, epochs=0, finetune_options=FinetuneOptions(1))
    assert mpq.history["finetune"]["steps"] == len(train)
    assert copy.deepcopy(FinetuneOptions(steps=3)) == FinetuneOptions(steps=3)
    assert pickle.loads(pickle.dumps(Engine(bf16=True))) == Engine(bf16=True)  # noqa: S301


@pytest.mark.parametrize(
    "asked",
    [
        {"costs": {"ms": 3}},
        {"costs": {"ms": ("x", {})}},
        {"costs": {"ms": (3, {"3": 5})}},
        {"costs": {"ms": (float("nan"), {})}},
        {"compression": float("inf")},
        {"weight_bits": True},
        {"weight_bits": float("nan")},
    ],
)
def test_a_budget_that_cannot_be_is_refused_where_it_is_written(asked):
    with pytest.raises(InvalidArgument):
        Budget(**asked)


def test_a_budget_cannot_be_changed_and_can_be_copied():
    budget = Budget(bitops="W4A4", costs={"ms": (3, {"3": {"W4A4": 1.0}})})
    for table in (budget.given, budget.limits, budget.costs):
        with pytest.raises(TypeError):
            table["bitops"] = "W2A2"
    assert copy.deepcopy(budget) == pickle.loads(pickle.dumps(budget)) == budget  # noqa: S301
    assert Budget.of(budget, {"bitops": "W2A2"}).given == {"bitops": "W2A2"}
