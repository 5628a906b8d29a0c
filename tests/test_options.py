"""Options and pins of one call: typos are named, dataclasses and mappings are alike, nothing outlives the call."""

import copy
from dataclasses import replace

import pytest
import torch

from hub_mpq import Budget, Engine, FinetuneOptions, HubMPQ, IndicatorOptions, LayerBits, MPQConfig
from hub_mpq.errors import HubMPQError, InvalidArgument
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
        (lambda mpq, train: mpq.search(bitop="W4A4"), "no option or limit 'bitop'; the limits are bitops, size"),
        (lambda mpq, train: mpq.search({"bitop": "W4A4"}), "'bitop'"),
        (lambda mpq, train: mpq.search("W4A4"), "a budget is a Budget or a mapping"),
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
    assert "fixed W7A7" in mpq.report()
    usage = dict(mpq.usage().amounts)
    mpq.save_pretrained(tmp_path)
    again = HubMPQ.from_pretrained(tmp_path, module=copy.deepcopy(net))
    assert again.graph["3"].fixed == LayerBits(7, 7)
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
    for wrong in ({"sense": "best"}, {"seed": "x"}, {"inferred": {"3": "W99"}}, {"inferred": 3}):
        bad = replace(mpq.scores, provenance={**mpq.scores.provenance, **wrong})
        write_indicators(tmp_path / "b.safetensors", bad)
        with pytest.raises(HubMPQError, match="provenance"):
            read_indicators(tmp_path / "b.safetensors")


@pytest.mark.parametrize("strategy", ["limpq", "dq"])
def test_a_run_that_is_resumed_while_it_fine_tunes_searches_no_more(net, train, strategy, tmp_path, monkeypatch):
    """The scores lie beside the states, whatever strategy made them."""

    class Stopped:
        """Batches that end in Ctrl-C once the quantizers are in."""

        def __iter__(self):
            for batch in train:
                if mpq.policy is not None and mpq.model is not mpq.float_model and "search" in mpq.seconds:
                    raise KeyboardInterrupt
                yield batch

        def __len__(self):
            return len(train)

    options = {"strategy": strategy, "bitops": "W3A3", "steps": 1, "indicator_options": {"steps": 1}}
    mpq = HubMPQ.from_module(copy.deepcopy(net), X)
    with pytest.raises(KeyboardInterrupt):
        mpq.quantize(train=Stopped(), checkpoint_dir=tmp_path, **options)
    found = mpq.scores
    monkeypatch.setattr("hub_mpq.model.train_scores", None)
    mpq = HubMPQ.from_module(copy.deepcopy(net), X)
    mpq.quantize(train=train, checkpoint_dir=tmp_path, resume=True, **options)
    assert mpq.scores == found
